"""The parts of a pipeline that are compiled, and their modes, entered together.

A part is a module inside the pipeline, named by where it is: ``"unet"``, ``"vae.decoder"``. Another is one registered
function: it is then compiled with the pipeline, recorded with every base, and edits with the masks of the UNet's edits;
neither the Editor nor its results know how many there are. :func:`use` gives a stock pipeline its parts without an
Editor.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar, cast

from torch import nn

from fisedit_compiler.compiling import one_at_a_time
from fisedit_compiler.config import Reuse, SparsifyConfig
from fisedit_compiler.errors import CaptureError, ConfigError, LayoutError, ModeError, RecordingError
from fisedit_compiler.module import SparseModule
from fisedit_compiler.pipelines.part_registry import (
    DECODER,
    PARTS,
    UNET,
    CompiledPart,
    Part,
    PartRecording,
    PartSession,
    chosen_parts,
    is_compiled,
    register_part,
)
from fisedit_compiler.progress import shown
from fisedit_compiler.recordings.recording import Recording
from fisedit_compiler.runtime.sessions.edit_masks import EditMasks
from fisedit_compiler.runtime.sessions.edit_session import EditSession

__all__ = [
    "DECODER",
    "PARTS",
    "UNET",
    "Part",
    "PartRecording",
    "PartSession",
    "Parts",
    "PartsInUse",
    "entered",
    "is_compiled",
    "of_unet",
    "register_part",
    "use",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")


def entered(modes: Mapping[str, Callable[[], AbstractContextManager[T]]], body: Callable[[Mapping[str, T]], R]) -> R:
    """Run ``body`` inside all modes, with what each of them gives.

    Each is entered by a ``with`` statement of its own, one inside the other: a mode that an ``ExitStack`` entered
    could outlive an interrupt (``runtime.sessions.modes``), and calls are told apart by the frame of the statement.

    Args:
        modes: by name, what makes the mode.
        body: what to run.
    """
    if not modes:
        return body({})
    (name, mode), *others = modes.items()
    with mode() as given:
        return entered(dict(others), lambda found: body({name: given, **found}))


class Parts:
    """The parts of one pipeline, compiled on the first use."""

    def __init__(
        self, pipe: Any, config: SparsifyConfig | None, default: SparsifyConfig, names: Sequence[str] | None = None
    ) -> None:
        """``config`` is the user's choice, ``default`` what stands for none, and ``names`` the parts, all if left out.

        Raises:
            ConfigError: a configuration was chosen for a UNet that is compiled already, or there is no such part.
        """
        if config is not None and is_compiled(pipe.unet):
            raise ConfigError("pipe.unet is compiled already; leave config out, or pass the original UNet")
        self.pipe, self.config = pipe, config or default
        self._given: dict[Part, nn.Module] = {}
        self._compiled: dict[Part, CompiledPart] = {}
        self._refused: dict[Part, nn.Module] = {}
        self._by_themselves: set[Part] = set()
        self.add(names, asked=True)
        self.given_back = False

    def add(self, names: Sequence[str] | None, *, asked: bool) -> None:
        """Also compile these, as far as the pipeline has them. What nobody ``asked`` for fails without a warning."""
        for part in chosen_parts(names):
            module = part.find(self.pipe)
            if module is not None and part not in self._given:
                self._given[part] = module
                if is_compiled(module):
                    self._compiled[part] = module
                if not asked:
                    self._by_themselves.add(part)

    def __getitem__(self, name: str) -> SparseModule:
        """The compiled module of a part that is ready."""
        return cast(SparseModule, self._compiled[PARTS[name]])

    @property
    def are_compiled(self) -> bool:
        """Whether nothing is left to compile."""
        return len(self._compiled) + len(self._refused) == len(self._given)

    def prepare(self, shows_progress: bool) -> None:
        """Compile what is not yet, and put it in its place.

        Raises:
            ModeError: the modules were given back, or someone else replaced one meanwhile.
            CaptureError: a module cannot be captured, and the pipeline does not go on without.
        """
        self._check_kept()
        for part in list(self._given):  # a copy: another thread may be compiling
            if part.optional:
                self._follow(part)
            elif part in self._compiled and part.find(self.pipe) is not self._compiled[part]:
                place = f"pipe.{part.way}"
                kept = "editor.compiled" if part.name == UNET else "what was there"
                raise ModeError(
                    f"{place} was replaced since this Editor compiled it; put the compiled {_called(part)} back "
                    f"({place} = {kept} before the change) or make a new Editor(pipe)"
                )
        if not self.are_compiled:
            self._compile(shows_progress)

    def _follow(self, part: Part) -> None:
        """Take another module that was put in the place of a part."""
        module = part.find(self.pipe)
        if module is not None and module is not self._compiled.get(part, self._given[part]):
            self._compiled.pop(part, None)
            self._refused.pop(part, None)
            self._given[part] = module
            if is_compiled(module):
                self._compiled[part] = module

    @one_at_a_time
    def _compile(self, shows_progress: bool) -> None:
        """Compile what no other thread did meanwhile."""
        with shown(shows_progress):
            for part, module in self._given.items():
                self._check_kept()
                if part not in self._compiled and part not in self._refused:
                    try:
                        compiled = part.compiled(module, self.config)
                    except (CaptureError, LayoutError) as error:
                        if not part.optional:
                            raise
                        level = logging.INFO if part in self._by_themselves else logging.WARNING
                        logger.log(level, "pipe.%s is not compiled and runs as it is: %s", part.name, error)
                        self._refused[part] = module
                        continue
                    part.put(self.pipe, cast(nn.Module, compiled))
                    self._compiled[part] = compiled

    def _check_kept(self) -> None:
        if self.given_back:
            raise ModeError("this Editor is closed; make a new Editor(pipe)")

    @one_at_a_time
    def restore(self) -> None:
        """Put the modules the pipeline was given with back, where nobody else put another; once and for all.

        Waits for another thread that compiles: what it puts into the pipeline would stay there.
        """
        if self.given_back:
            return
        self.given_back = True
        for part, compiled in self._compiled.items():
            if part.find(self.pipe) is compiled:
                part.put(self.pipe, self._given[part])

    def recording(self, maps: int = 0) -> Mapping[str, Callable[[], AbstractContextManager[PartRecording]]]:
        """By the name of each part, what makes its mode of recording; for ``maps`` see :meth:`record`."""

        def mode(part: Part, compiled: CompiledPart) -> AbstractContextManager[PartRecording]:
            return cast(SparseModule, compiled).record(maps=maps) if part.keeps_maps else compiled.record()

        return {part.name: functools.partial(mode, part, compiled) for part, compiled in self._compiled.items()}

    def editing(
        self,
        recordings: Mapping[str, PartRecording],
        masks: Any,
        *,
        record: bool,
        copies: int,
        reuse: Reuse | None = None,
    ) -> Mapping[str, Callable[[], AbstractContextManager[PartSession]]]:
        """Likewise of editing, for the parts that there is a recording of; see :meth:`edit`."""

        def mode(part: Part, compiled: CompiledPart) -> AbstractContextManager[PartSession]:
            if part.name != UNET or reuse is None:
                return compiled.edit(recordings[part.name], masks, record=record, copies=copies)
            unet, recording = cast(SparseModule, compiled), cast(Recording, recordings[part.name])
            return unet.edit(recording, masks, record=record, copies=copies, reuse=reuse)

        return {
            part.name: functools.partial(mode, part, compiled)
            for part, compiled in self._compiled.items()
            if part.name in recordings
        }

    def record(self, maps: int, body: Callable[[], R]) -> tuple[R, Mapping[str, PartRecording]]:
        """Run ``body`` with all parts recording; returns its result and a recording by the name of each part.

        Args:
            maps: of how many calls cross-attention maps are kept, in parts that have any.
            body: runs the pipeline.
        """
        return entered(self.recording(maps), lambda recordings: (body(), recordings))

    def edit(
        self,
        recordings: Mapping[str, PartRecording],
        masks: EditMasks | None,
        body: Callable[[Mapping[str, PartSession]], R],
        *,
        record: bool,
        copies: int,
        reuse: Reuse | None = None,
    ) -> R:
        """Run ``body`` with every part editing its recording; it gets the sessions by the names of their parts.

        A part that the base has no recording of computes everything.

        Args:
            recordings: the base's.
            masks: of the edits; ``None`` if they are to be found.
            body: runs the pipeline.
            record: whether the sessions keep recordings of the edits.
            copies: how many edits are made.
            reuse: whether the UNet's calls may take values from earlier ones; ``None`` for what its configuration says.
        """
        return entered(self.editing(recordings, masks, record=record, copies=copies, reuse=reuse), body)


class PartsInUse:
    """The parts of a stock pipeline inside :func:`use`, with their modes."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def __getitem__(self, name: str) -> Any:
        """The compiled module of a part, such as ``used["unet"]``."""
        return self._parts[name]

    @contextmanager
    def record(self, maps: int = 0) -> Iterator[Mapping[str, PartRecording]]:
        """Record one run of the pipeline: ``with used.record() as recordings: pipe(prompt, ...)``.

        Args:
            maps: as for ``SparseModule.record``.
        """
        with _all(self._parts.recording(maps)) as recordings:
            yield recordings

    @contextmanager
    def edit(
        self, recordings: Mapping[str, PartRecording], mask: Any = None, *, record: bool = False, copies: int = 1
    ) -> Iterator[Mapping[str, PartSession]]:
        """Edit a recorded run: ``with used.edit(recordings, mask): pipe(new_prompt, ...)``.

        Yields the session of each part; ``record`` and ``copies`` are as for ``SparseModule.edit``.

        Args:
            recordings: what :meth:`record` gave.
            mask: as for ``SparseModule.edit``: in any form, for all parts.
            record: keep recordings of the edits, ``sessions[name].results``.
            copies: how many edits are made at once.

        Raises:
            RecordingError: there is no recording of the UNet among them, or it is none of this model.
            MaskError: the mask does not fit.
        """
        unet = recordings.get(UNET) if isinstance(recordings, Mapping) else None
        if not isinstance(unet, Recording):
            raise RecordingError("edit() needs what `with used.record() as recordings:` gave, after that block")
        read = mask
        if mask is not None and unet.calls:  # read and grown once, for all parts
            read = EditMasks.of(mask, copies, unet.height, unet.width, self._parts[UNET].sparsify_config.dilation)
        with _all(self._parts.editing(recordings, read, record=record, copies=copies)) as sessions:
            yield sessions


@contextmanager
def use(
    pipe: Any,
    config: SparsifyConfig | None = None,
    *,
    parts: Sequence[str] | None = None,
    progress: bool = True,
) -> Iterator[PartsInUse]:
    """Compile the parts of a stock pipeline and put them into it; they are taken out again after the block.

    Args:
        pipe: a diffusers pipeline.
        config: how the UNet is compiled, as for ``sparsify``.
        parts: names of those to compile, all that are known if left out.
        progress: whether compilation shows a bar.

    Raises:
        ConfigError: there is no such part, or ``config`` was given for a compiled UNet.
        CaptureError: the UNet cannot be captured.
    """
    if getattr(pipe, "unet", None) is None:
        raise ConfigError(f"{type(pipe).__name__} has no `unet`; use() takes a diffusers pipeline that has one")
    found = Parts(pipe, config, SparsifyConfig(), parts)
    try:
        found.prepare(progress)
        yield PartsInUse(found)
    finally:
        found.restore()


@contextmanager
def _all(modes: Mapping[str, Callable[[], AbstractContextManager[T]]]) -> Iterator[Mapping[str, T]]:
    """Enter all modes, each by a ``with`` statement of its own; see :func:`entered`."""
    if not modes:
        yield {}
        return
    (name, mode), *others = modes.items()
    with mode() as given, _all(dict(others)) as found:
        yield {name: given, **found}


def of_unet(sessions: Mapping[str, PartSession]) -> EditSession:
    """The session of the UNet."""
    return cast(EditSession, sessions[UNET])


def _called(part: Part) -> str:
    return "UNet" if part.name == UNET else part.name
