"""The ways to edit that the documents show, each as it comes: what ``entry_points.py`` times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch

from benchmarks.support.subjects import moved_mask
from benchmarks.support.whole_runs import BASE_PROMPT, WholeRuns


@dataclass(frozen=True)
class Opened:
    """A way with its base made.

    Attributes:
        edit: makes one edit with a new prompt.
        about: makes another one, untimed, and says what it was: ``mask_fraction``, ``calls`` by kind, and whether the
            latents outside the mask are the base's (``unchanged_outside``).
        slow: by now, what was refused and why, in sentences.
        pictures: how many an edit makes.
    """

    edit: Callable[[], Any]
    about: Callable[[], dict[str, Any]]
    slow: Callable[[], Iterable[str | None]]
    pictures: int = 1


@dataclass(frozen=True)
class Way:
    """A way to edit that the documents show.

    Attributes:
        shown: as what the documents show it, in the words of the test.
        said: in a table.
        opened: opens it for a pipeline and a mask; closed again, it gives the pipeline its own modules back.
    """

    shown: str
    said: str
    opened: Callable[[WholeRuns, torch.Tensor], AbstractContextManager[Opened]]


# -- by an Editor ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ByEditor:
    """Edits of a base by ``Editor(pipe)``.

    Attributes:
        base: makes it.
        edit: makes the edits of it.
        pictures: their number.
    """

    base: Callable[[Any, WholeRuns, torch.Tensor], Any]
    edit: Callable[[Any, Any, WholeRuns, torch.Tensor], list[Any]]
    pictures: int = 1

    @contextmanager
    def __call__(self, runs: WholeRuns, mask: torch.Tensor) -> Iterator[Opened]:
        from fisedit_compiler import Editor

        with Editor(runs.pipe) as editor:
            base = self.base(editor, runs, mask)
            notes: set[str] = set()

            def edit() -> list[Any]:
                return self.edit(editor, base, runs, mask)

            def about() -> dict[str, Any]:
                edits = edit()
                for report in (one.report for one in edits):
                    notes.update((report.note, report.decode.note if report.decode else ""))
                return {
                    "mask_fraction": round(sum(one.report.area for one in edits) / len(edits), 4),
                    "unchanged_outside": all(one.unchanged_outside for one in edits),
                    "calls": dict(Counter(kind for kind, _ in edits[0].report.calls)),
                }

            def slow() -> Iterable[str | None]:
                left_out = (f"pipe.{part.name} is not compiled" for part in editor._parts._refused)
                return (*notes, *left_out, *refusals(editor.compiled))

            yield Opened(edit, about, slow, self.pictures)


def _generated(editor: Any, runs: WholeRuns, mask: torch.Tensor) -> Any:
    return editor.generate(BASE_PROMPT, **runs.settings)


def _edited(editor: Any, runs: WholeRuns, mask: torch.Tensor) -> Any:
    return editor.edit(_generated(editor, runs, mask), next(runs.prompts), mask=mask)


def _loaded(editor: Any, runs: WholeRuns, mask: torch.Tensor) -> Any:
    picture = runs.run(BASE_PROMPT)
    settings = {name: value for name, value in runs.settings.items() if name not in ("height", "width")}
    return editor.load(picture, BASE_PROMPT, **settings)


def _inside(editor: Any, base: Any, runs: WholeRuns, mask: torch.Tensor) -> list[Any]:
    return [editor.edit(base, next(runs.prompts), mask=mask)]


def _inside_another(editor: Any, base: Any, runs: WholeRuns, mask: torch.Tensor) -> list[Any]:
    another = moved_mask(mask, 8)
    return [editor.edit(base, next(runs.prompts), mask=mask if another is None else another)]


def _found(editor: Any, base: Any, runs: WholeRuns, mask: torch.Tensor) -> list[Any]:
    return [editor.edit(base, next(runs.prompts))]


def _two(editor: Any, base: Any, runs: WholeRuns, mask: torch.Tensor) -> list[Any]:
    return list(editor.edit_many(base, [next(runs.prompts), next(runs.prompts)], mask=mask))


# -- around a stock pipeline -------------------------------------------------------------------------


@dataclass(frozen=True)
class Modes:
    """How a stock pipeline records and edits.

    Attributes:
        record: the mode of the base's run.
        edit: the mode of an edit's run, of what ``record`` gave.
        compiled: the compiled UNet, once a run was made.
        session: of the UNet, of what ``edit`` gave.
        notes: what else was refused, of what ``edit`` gave.
    """

    record: Callable[[], AbstractContextManager[Any]]
    edit: Callable[[Any], AbstractContextManager[Any]]
    compiled: Callable[[], Any]
    session: Callable[[Any], Any] = lambda given: given
    notes: Callable[[Any], Iterable[str | None]] = lambda given: ()


def _run(runs: WholeRuns, modes: Modes) -> Opened:
    """Record the base; edits are runs of the same pipeline."""
    from fisedit_compiler.tensors.bits import differs

    base: list[torch.Tensor] = []
    with modes.record() as recording:
        runs.run(BASE_PROMPT, callback_on_step_end=partial(_kept, base))
    notes: set[str | None] = set()

    def edit(**options: Any) -> Any:
        with modes.edit(recording) as given:
            runs.run(next(runs.prompts), **options)
        return given

    def about() -> dict[str, Any]:
        edited: list[torch.Tensor] = []
        given = edit(callback_on_step_end=partial(_kept, edited))
        session = modes.session(given)
        notes.update((session.fallback, *modes.notes(given)))
        outside = ~session.mask.to(runs.device)
        return {
            "mask_fraction": round(session.mask.float().mean().item(), 4),
            "unchanged_outside": not bool(differs(edited[-1][..., outside], base[-1][..., outside]).any()),
            "calls": dict(Counter(kind for kind, _ in session.timings)),
        }

    return Opened(edit, about, lambda: (*notes, *refusals(modes.compiled())))


def _kept(found: list[torch.Tensor], pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
    """A step callback of diffusers that keeps the latents."""
    found.append(values["latents"])
    return values


@contextmanager
def _sparsified(runs: WholeRuns, mask: torch.Tensor) -> Iterator[Opened]:
    from fisedit_compiler import sparsify

    runs.pipe.unet = compiled = sparsify(runs.pipe.unet)
    yield _run(runs, Modes(compiled.record, partial(compiled.edit, mask=mask), lambda: compiled))


@contextmanager
def _parts_used(runs: WholeRuns, mask: torch.Tensor) -> Iterator[Opened]:
    from fisedit_compiler.pipelines import parts

    def notes(sessions: Mapping[str, Any]) -> Iterable[str]:
        if parts.DECODER not in sessions:
            return ("the decoder is not compiled",)
        return (decode.note for decode in sessions[parts.DECODER].decodes)

    with parts.use(runs.pipe) as used:
        modes = Modes(
            used.record,
            partial(used.edit, mask=mask),
            lambda: used[parts.UNET],
            session=parts.of_unet,
            notes=notes,
        )
        yield _run(runs, modes)


@contextmanager
def _by_dynamo(runs: WholeRuns, mask: torch.Tensor) -> Iterator[Opened]:
    from fisedit_compiler import dynamo

    runs.pipe.unet = unet = cast(torch.nn.Module, torch.compile(runs.pipe.unet, backend="fisedit"))
    modes = Modes(
        partial(dynamo.record, unet),
        lambda recording: dynamo.edit(unet, recording, mask),
        lambda: dynamo.sparse_module(unet),
    )
    yield _run(runs, modes)


WAYS = {
    "edit": Way("Editor.edit(Editor.generate, mask)", "Editor.edit with a mask", ByEditor(_generated, _inside)),
    "edit-found": Way("Editor.edit(Editor.generate)", "Editor.edit, mask found", ByEditor(_generated, _found)),
    "edit-again": Way("Editor.edit(Editor.edit)", "Editor.edit of an edit", ByEditor(_edited, _inside_another)),
    "edit-many": Way("Editor.edit_many", "Editor.edit_many, a picture of two", ByEditor(_generated, _two, 2)),
    "edit-loaded": Way("Editor.edit(Editor.load)", "Editor.edit of a loaded picture", ByEditor(_loaded, _inside)),
    "sparsify": Way("SparseModule.edit", "sparsify(unet)", _sparsified),
    "parts": Way("PartsInUse.edit", "parts.use(pipe)", _parts_used),
    "dynamo": Way("fisedit_compiler.dynamo.edit", 'torch.compile, "fisedit"', _by_dynamo),
}
"""By the names that ``--ways`` takes."""


def refusals(compiled: Any) -> list[str | None]:
    """Why calls of a compiled module run eagerly or are interpreted, as far as code was asked for."""
    executables = compiled._programs.executables()
    return [why for one in executables for why in (one.backend.refused, one.dense.refused)]
