"""The parts of a pipeline that are compiled: which there are, how each is compiled, and their modes, entered together.

A part is a module inside the pipeline, named by where it is: ``"unet"``, ``"vae.decoder"``. Only the UNet is one yet.
Another is one registered function: it is then compiled with the pipeline, recorded with every base, and edits with the
masks of the UNet's edits; neither the Editor nor its results know how many there are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard, TypeVar

from torch import nn

import fisedit_compiler.api
from fisedit_compiler.compiling import one_at_a_time
from fisedit_compiler.config import SparsifyConfig
from fisedit_compiler.errors import ConfigError, ModeError
from fisedit_compiler.module import SparseModule
from fisedit_compiler.progress import shown
from fisedit_compiler.recordings.recording import Recording
from fisedit_compiler.runtime.sessions.edit_masks import EditMasks
from fisedit_compiler.runtime.sessions.edit_session import EditSession
from fisedit_compiler.runtime.sessions.modes import Mode

UNET = "unet"
"""The part that every step calls; reports and masks are about its calls."""

Compile = Callable[[nn.Module, SparsifyConfig], SparseModule]
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Part:
    """One kind of part.

    Attributes:
        name: the way to the module from the pipeline, attributes joined by dots; also the name of its recording.
        compiled: compiles the module with the Editor's configuration.
        keeps_maps: whether it has cross-attention maps to record.
    """

    name: str
    compiled: Compile
    keeps_maps: bool = False

    def find(self, pipe: Any) -> Any:
        """The module in a pipeline; ``None`` if that has none there."""
        return functools.reduce(lambda owner, name: getattr(owner, name, None), self.name.split("."), pipe)

    def put(self, pipe: Any, module: nn.Module) -> None:
        """Put a module in its place."""
        *way, last = self.name.split(".")
        setattr(functools.reduce(getattr, way, pipe), last, module)


PARTS: dict[str, Part] = {}


def register_part(name: str, *, keeps_maps: bool = False) -> Callable[[Compile], Compile]:
    """Decorator of the function that compiles a part; it makes the part known to Editors made from then on.

    Its module is edited in the latent's lattice: its spatial input has the latents' height and width. The decorated
    function gets the module and the Editor's configuration, and may change the latter for its module.

    Args:
        name: the way to the module from the pipeline, such as ``"vae.decoder"``.
        keeps_maps: whether the module has cross-attention maps to record.

    Raises:
        ConfigError: the part is known already.
    """
    if name in PARTS:
        raise ConfigError(f"there is a part {name!r} already")

    def register(compiled: Compile) -> Compile:
        PARTS[name] = Part(name, compiled, keeps_maps)
        return compiled

    return register


@register_part(UNET, keeps_maps=True)
def _compiled_unet(module: nn.Module, config: SparsifyConfig) -> SparseModule:
    return fisedit_compiler.api.sparsify(module, config)


def entered(modes: Mapping[str, Callable[[], Mode[T]]], body: Callable[[Mapping[str, T]], R]) -> R:
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

    def __init__(self, pipe: Any, config: SparsifyConfig | None, default: SparsifyConfig) -> None:
        """``config`` is the user's choice and ``default`` what stands for none.

        Raises:
            ConfigError: a configuration was chosen for a UNet that is compiled already.
        """
        if config is not None and is_compiled(pipe.unet):
            raise ConfigError("pipe.unet is compiled already; leave config out, or pass the original UNet")
        self.pipe, self.config = pipe, config or default
        found = {part: part.find(pipe) for part in PARTS.values()}
        self._given: dict[Part, nn.Module] = {part: module for part, module in found.items() if module is not None}
        self._compiled: dict[Part, SparseModule] = {
            part: module for part, module in self._given.items() if is_compiled(module)
        }
        self.given_back = False

    def __getitem__(self, name: str) -> SparseModule:
        """The compiled module of a part that is ready."""
        return self._compiled[PARTS[name]]

    @property
    def are_compiled(self) -> bool:
        """Whether nothing is left to compile."""
        return len(self._compiled) == len(self._given)

    def prepare(self, shows_progress: bool) -> None:
        """Compile what is not yet, and put it in its place.

        Raises:
            ModeError: the modules were given back, or someone else replaced one meanwhile.
            CaptureError: a module cannot be captured.
        """
        self._check_kept()
        for part, compiled in list(self._compiled.items()):  # a copy: another thread may be compiling
            if part.find(self.pipe) is not compiled:
                place = f"pipe.{part.name}"
                kept = "editor.compiled" if part.name == UNET else "what was there"
                raise ModeError(
                    f"{place} was replaced since this Editor compiled it; put the compiled {_called(part)} back "
                    f"({place} = {kept} before the change) or make a new Editor(pipe)"
                )
        if not self.are_compiled:
            self._compile(shows_progress)

    @one_at_a_time
    def _compile(self, shows_progress: bool) -> None:
        """Compile what no other thread did meanwhile."""
        with shown(shows_progress):
            for part, module in self._given.items():
                self._check_kept()
                if part not in self._compiled:
                    compiled = part.compiled(module, self.config)
                    part.put(self.pipe, compiled)
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

    def record(self, maps: int, body: Callable[[], R]) -> tuple[R, Mapping[str, Recording]]:
        """Run ``body`` with all parts recording; returns its result and a recording by the name of each part.

        Args:
            maps: of how many calls cross-attention maps are kept, in parts that have any.
            body: runs the pipeline.
        """

        def mode(part: Part, compiled: SparseModule) -> Mode[Recording]:
            return compiled.record(maps=maps) if part.keeps_maps else compiled.record()

        modes = {part.name: functools.partial(mode, part, compiled) for part, compiled in self._compiled.items()}
        return entered(modes, lambda recordings: (body(), recordings))

    def edit(
        self,
        recordings: Mapping[str, Recording],
        masks: EditMasks | None,
        body: Callable[[Mapping[str, EditSession]], R],
        *,
        record: bool,
        copies: int,
    ) -> R:
        """Run ``body`` with every part editing its recording; it gets the sessions by the names of their parts.

        A part that the base has no recording of computes everything.

        Args:
            recordings: the base's.
            masks: of the edits; ``None`` if they are to be found.
            body: runs the pipeline.
            record: whether the sessions keep recordings of the edits.
            copies: how many edits are made.
        """

        def mode(part: Part, compiled: SparseModule) -> Mode[EditSession]:
            return compiled.edit(recordings[part.name], masks, record=record, copies=copies)

        modes = {
            part.name: functools.partial(mode, part, compiled)
            for part, compiled in self._compiled.items()
            if part.name in recordings
        }
        return entered(modes, body)


def is_compiled(module: Any) -> TypeGuard[SparseModule]:
    """Whether a module has the modes of one that ``sparsify`` returned."""
    return callable(getattr(module, "record", None)) and callable(getattr(module, "edit", None))


def _called(part: Part) -> str:
    return "UNet" if part.name == UNET else part.name
