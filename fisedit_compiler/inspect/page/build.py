"""The page put together: drawing, summary, mask pyramid, passes with what each changed, slots, time line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from fisedit_compiler.geometry.site_plan import SitePlan
from fisedit_compiler.graph.inputs import slot_of
from fisedit_compiler.graph.specs import nbytes, spec_of
from fisedit_compiler.inspect import costs
from fisedit_compiler.inspect.explain import TEXT_TOKENS, explain_module
from fisedit_compiler.inspect.page.drawing import KINDS, draw_program, node_facts
from fisedit_compiler.inspect.page.pyramid import draw_pyramid
from fisedit_compiler.inspect.page.timeline import Event, draw_timeline
from fisedit_compiler.inspect.stages import Stages, choose_program, stages_of
from fisedit_compiler.pages import render

if TYPE_CHECKING:
    from fisedit_compiler.inspect.compiled import CompiledModule
    from fisedit_compiler.lowering.program import CompiledProgram


SECTIONS = {"graph": "Program", "summary": "Summary", "mask": "Mask", "passes": "Passes", "slots": "Slots"}
"""Anchors of the page and their names; a time line comes last."""


@dataclass(frozen=True)
class Pass:
    """What a pass did. ``changes`` are lines of the difference that it made and their kinds; empty where left out."""

    name: str
    milliseconds: float
    nodes: int
    what: str
    changes: list[tuple[str, str]]


@dataclass(frozen=True)
class SlotRow:
    """A slot and the bytes that a call records in it."""

    name: str
    kind: str
    layout: str
    nbytes: float


def build_page(
    compiled: CompiledModule,
    mask: Tensor,
    *,
    title: str = "",
    batch: int = 2,
    events: Sequence[Event] | None = None,
    program: int = 0,
) -> str:
    """A self-contained HTML page about a compiled module.

    Args:
        compiled: the result of ``sparsify``.
        mask: bool ``[H, W]`` at latent resolution, for the pyramid and the sizes.
        title: heading; the model's class if empty.
        batch: samples of a call, for the sizes; 2 is one image with guidance.
        events: the operations of one call (``timeline.profile_call``), drawn along a line.
        program: which of the module's programs.

    Raises:
        ConfigError: nothing is compiled yet, or there is no such program.
        MaskError: the mask is no bool matrix.
        PlanError: the model does not take its size.
    """
    chosen = choose_program(compiled.programs, program)
    parameter = next(compiled.original.parameters())
    plan = SitePlan.build(mask, chosen.levels, chosen.convs, dilation=compiled.sparsify_config.dilation)
    executable = compiled._programs.executables()[program]
    plan = executable.plans.divided(plan, batch, parameter.element_size(), parameter.device.type)
    return render(
        __package__,
        "page.html",
        title=title or type(compiled.original).__name__,
        sections=SECTIONS if events is None else SECTIONS | {"time": "One call"},
        kinds=KINDS,
        drawing=draw_program(chosen),
        summary=str(explain_module(compiled, mask, batch, None, TEXT_TOKENS)),
        pyramid=draw_pyramid(plan),
        passes=_passes(stages_of(chosen)),
        slots=_slots(chosen, batch, *mask.shape),
        timeline=None if events is None else draw_timeline(list(events)),
        nodes=node_facts(chosen),
    )


def _passes(stages: Stages) -> list[Pass]:
    passes = []
    for stage in stages:
        removed, added = (", ".join(f"{n} {op}" for op, n in of.items()) for of in (stage.removed, stage.added))
        what = f"removed {removed or 'nothing'}; added {added or 'nothing'}" if stage.name != "capture" else "the model"
        changes = stages.changes(stage.name, context=1) if stage.name != "recording" else ""
        passes.append(Pass(stage.name, stage.seconds * 1e3, len(stage.graph.nodes), what, _kinds_of(changes)))
    return passes


def _kinds_of(diff: str) -> list[tuple[str, str]]:
    """The lines of a difference without their comments, each with what its sign means."""
    kinds = {"+": "add", "-": "del", "@": "hunk"}
    return [
        (kinds.get(line[:1], ""), line if line[1:].startswith("#") else line.split("  #")[0].rstrip())
        for line in diff.splitlines()
    ]


def _slots(program: CompiledProgram, batch: int, height: int, width: int) -> list[SlotRow]:
    values = costs.call_sizes(program.multiple, height, width, batch, TEXT_TOKENS)
    loaded = [node for node in program.update.nodes if slot_of(node)]
    stored = {slot_of(node): costs.evaluate(nbytes(spec_of(node)), values) for node in loaded}
    return [SlotRow(slot.name, slot.kind.name, str(slot.layout), stored[slot.name]) for slot in program.slots]
