"""The page put together: drawing, summary, mask pyramid, passes with what each changed, slots, time line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib import resources
from string import Template
from typing import TYPE_CHECKING

from torch import Tensor

from fisedit_compiler.geometry.site_plan import SitePlan
from fisedit_compiler.graph.inputs import slot_of
from fisedit_compiler.graph.specs import spec_of
from fisedit_compiler.inspect import costs
from fisedit_compiler.inspect.explain import TEXT_TOKENS, explain_module
from fisedit_compiler.inspect.page.drawing import KINDS, draw_program, node_facts
from fisedit_compiler.inspect.page.pyramid import draw_pyramid
from fisedit_compiler.inspect.page.timeline import Event, draw_timeline
from fisedit_compiler.inspect.stages import Stages, choose_program, stages_of

if TYPE_CHECKING:
    from fisedit_compiler.inspect.compiled import CompiledModule
    from fisedit_compiler.lowering.program import CompiledProgram


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
    plan = executable.divided(plan, batch, parameter.element_size(), parameter.device.type)
    timeline = "" if events is None else f'<section id="time"><h2>One call</h2>{draw_timeline(list(events))}</section>'
    template = Template((resources.files(__package__) / "template.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(title or type(compiled.original).__name__),
        legend="".join(
            f'<span><i style="background:{colour}"></i>{escape(name)}: {escape(meaning)}</span>'
            for name, (colour, meaning) in KINDS.items()
        ),
        drawing=draw_program(chosen),
        summary=escape(str(explain_module(compiled, mask, batch, None, TEXT_TOKENS))),
        pyramid=draw_pyramid(plan),
        passes=_passes(stages_of(chosen)),
        slots=_slots(chosen, batch, *mask.shape),
        timeline=timeline,
        timeline_link="" if events is None else '<a href="#time">One call</a>',
        nodes=json.dumps(node_facts(chosen), separators=(",", ":")).replace("</", "<\\/"),
    )


def _passes(stages: Stages) -> str:
    parts = []
    for stage in stages:
        removed, added = (", ".join(f"{n} {op}" for op, n in of.items()) for of in (stage.removed, stage.added))
        what = f"removed {removed or 'nothing'}; added {added or 'nothing'}" if stage.name != "capture" else "the model"
        changes = stages.changes(stage.name, context=1) if stage.name != "recording" else ""
        shown = f"<pre>{_coloured(changes)}</pre>" if changes else ""
        parts.append(
            f"<details><summary><b>{escape(stage.name)}</b> {stage.seconds * 1e3:.1f} ms, "
            f"{len(stage.graph.nodes)} nodes: {escape(what)}</summary>{shown}</details>"
        )
    return "\n".join(parts)


def _coloured(diff: str) -> str:
    kinds = {"+": "add", "-": "del", "@": "hunk"}
    lines = []
    for line in diff.splitlines():
        code = line.split("  #")[0].rstrip() if not line[1:].startswith("#") else line
        name = kinds.get(line[:1])
        lines.append(f'<span class="{name}">{escape(code)}</span>' if name else escape(code))
    return "\n".join(lines)


def _slots(program: CompiledProgram, batch: int, height: int, width: int) -> str:
    values = costs.call_sizes(program.multiple, height, width, batch, TEXT_TOKENS)
    loaded = [node for node in program.update.nodes if slot_of(node)]
    nbytes = {slot_of(node): costs.evaluate(costs.nbytes(spec_of(node)), values) for node in loaded}
    rows = [
        f"<tr><td>{escape(slot.name)}</td><td>{slot.kind}</td><td>{escape(str(slot.layout))}</td>"
        f'<td class="number">{nbytes[slot.name] / 2**10:,.0f}</td></tr>'
        for slot in program.slots
    ]
    head = '<tr><th>slot</th><th>kind</th><th>layout</th><th class="number">KiB a call</th></tr>'
    total = sum(nbytes.values()) / 2**20
    return f"<p>{len(rows)} slots, {total:,.1f} MiB a call.</p><table>{head}{''.join(rows)}</table>"
