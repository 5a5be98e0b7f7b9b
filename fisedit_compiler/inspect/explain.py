"""How ``compiled.explain()`` is made: what became of every operation, rows and blocks per level, bytes and FLOPs.

Making an explanation reads the program and, for a mask, builds its site plan; nothing is compiled or run. What one
holds is in ``explanation.py``, what operations cost in ``costs.py``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import fx

from fisedit_compiler.errors import MaskError, PlanError
from fisedit_compiler.geometry.site_plan import SitePlan
from fisedit_compiler.graph import ir
from fisedit_compiler.graph.inputs import slot_of
from fisedit_compiler.graph.sizes import row_symbol
from fisedit_compiler.graph.specs import nbytes, spec_of
from fisedit_compiler.inspect import costs
from fisedit_compiler.inspect.costs import Cost, Values
from fisedit_compiler.inspect.explanation import Explanation
from fisedit_compiler.inspect.facts import (
    LevelRows,
    OperationCount,
    OperationKernel,
    ProgramExplanation,
    Refusal,
    Setting,
    SlotBytes,
    Work,
)
from fisedit_compiler.inspect.providers import operation_kernels
from fisedit_compiler.masks import mask_pixels, to_site_mask
from fisedit_compiler.runtime.sessions.fallback import dense_reason
from fisedit_compiler.runtime.sessions.measured import Measured

if TYPE_CHECKING:
    from fisedit_compiler.inspect.compiled import CompiledModule
    from fisedit_compiler.lowering.program import CompiledProgram
    from fisedit_compiler.runtime.execution.executable import Executable
    from fisedit_compiler.runtime.sessions.reuse import ReusePlan
    from fisedit_compiler.slots.base import Slot

Fate = Literal["rewritten", "hoisted", "fused", "kept", "refused"]
TEXT_TOKENS = 77
"""Tokens of a prompt that formulas are evaluated for, where no other number is given."""


def explain_module(
    module: CompiledModule, mask: Any, batch: int, size: tuple[int, int] | None, tokens: int
) -> Explanation:
    """Explain every program of a module; see :meth:`SparseModule.explain` for arguments and errors."""
    measured = tuple(module._measured.values())
    if mask is not None:
        mask = _site_mask(mask, size)
        size = (int(mask.shape[0]), int(mask.shape[1]))
    parameter = next(module.original.parameters(), torch.empty(0))
    element_size, device = parameter.element_size(), parameter.device
    programs = []
    for executable in module._programs.executables():
        height, width = size or _default_size(module.original, executable.program.multiple)
        setting = Setting(height, width, batch, tokens, element_size, device.type, module._recorded_calls)
        plan = None
        if mask is not None:
            program, dilation = executable.program, module.sparsify_config.dilation
            plan = SitePlan.build(mask, program.levels, program.convs, dilation=dilation)
            plan = executable.plans.divided(plan, batch, element_size, device.type)
        programs.append(explain_program(executable, setting, plan, measured))
    note = "" if mask is None else dense_reason(mask, module.sparsify_config, str(device)) or ""
    if mask is not None and not mask.any():
        note = "the mask is empty: calls give the recorded outputs back"
    if not programs:
        note = "nothing is compiled yet: record a call, or pass example_inputs to sparsify"
    return Explanation(tuple(programs), note, measured)


def explain_program(
    executable: Executable,
    setting: Setting,
    plan: SitePlan | None = None,
    measured: Iterable[Measured] = (),
    reuse: ReusePlan | None = None,
) -> ProgramExplanation:
    """Explain one program for one call.

    Args:
        executable: the program, bound.
        setting: the call.
        plan: a plan in blocks of the mask, on any device.
        measured: calls that were timed; those that are comparable are put beside the costs.
        reuse: which calls of an edit take values from earlier ones; without it, what the configuration says.

    Raises:
        PlanError: the model does not take calls of this size.
    """
    program, multiple = executable.program, executable.program.multiple
    if setting.height % multiple or setting.width % multiple or min(setting.height, setting.width) < 1:
        raise PlanError(
            f"{setting.height}x{setting.width} sites are not divisible by {multiple}, the model's total downsampling; "
            f"explain it for a size whose height and width are multiples of {multiple}"
        )
    values = costs.call_sizes(multiple, setting.height, setting.width, setting.batch, setting.tokens)
    nodes = {node.name: costs.node_cost(node) for node in program.captured.graph.nodes if node.op == "call_function"}
    dense = costs.total(nodes.values())
    everything = dense.at(values)
    return ProgramExplanation(
        inputs=program.spatial,
        setting=setting,
        convolutions=len(program.layers),
        operations=_operations(program, nodes, values, everything[0]),
        refusals=_refusals(program, nodes, values, everything),
        area=None if plan is None else plan.area,
        levels=() if plan is None else _levels(executable, plan, setting),
        slots=_slots(program, values),
        work=_work(program, dense, values, setting, plan, tuple(measured), reuse),
        kernels=_kernels(executable, values, setting, plan),
        reuse=_reuse(program, reuse),
    )


def fates(program: CompiledProgram) -> dict[str, Fate]:
    """What became of every captured operation, by the name of its node; the words are :class:`OperationCount`'s."""
    refused = {name for name, *_ in program.refusals}
    in_step = _by_origin([program.step])
    in_bundles = _by_origin(bundle.graph for bundle in program.bundles)
    found: dict[str, Fate] = {}
    for node in program.captured.graph.nodes:
        if node.op != "call_function":
            continue
        # A part of a merged layer's result is none of the layers.
        here = [copy for copy in in_step.get(node.name, ()) if _is_part(node) or not _is_part(copy)]
        if node.name in refused:
            found[node.name] = "refused"
        elif "expr" in node.meta or any("layout" in copy.meta for copy in here):
            found[node.name] = "kept"
        elif here:
            found[node.name] = "rewritten"
        else:
            found[node.name] = "hoisted" if node.name in in_bundles and node.name not in in_step else "fused"
    return found


def _site_mask(mask: Any, size: tuple[int, int] | None) -> torch.Tensor:
    if size is None:
        if getattr(mask, "shape", None) is None:
            raise MaskError(
                f"explain() cannot tell the latent's size from a mask of type {type(mask).__name__}; pass it "
                "as size=(height, width)"
            )
        return mask_pixels(mask)
    return to_site_mask(mask, *size)


def _default_size(module: Any, multiple: int) -> tuple[int, int]:
    """Height and width to explain a module for if nobody names any: its config's, or eight times what it divides by."""
    config = getattr(module, "config", None)
    size: Any = getattr(config, "sample_size", None)
    height, width = size if isinstance(size, (list, tuple)) and len(size) == 2 else (size, size)
    if all(isinstance(sites, int) and sites > 0 and sites % multiple == 0 for sites in (height, width)):
        return height, width
    return 8 * multiple, 8 * multiple


def _is_part(node: fx.Node) -> bool:
    return node.target is operator.getitem


def _by_origin(graphs: Iterable[fx.Graph]) -> dict[str, list[fx.Node]]:
    found: dict[str, list[fx.Node]] = {}
    for graph in graphs:
        for node in graph.nodes:
            if node.op == "call_function" and "origin" in node.meta:
                found.setdefault(node.meta["origin"], []).append(node)
    return found


def _operations(
    program: CompiledProgram, nodes: Mapping[str, Cost], values: Values, everything: int
) -> tuple[OperationCount, ...]:
    fate = fates(program)
    by_operation: dict[str, list[str]] = {}
    for node in program.captured.graph.nodes:
        if node.op == "call_function":
            by_operation.setdefault(ir.target_name(node.target), []).append(node.name)
    rows = []
    for operation, names in by_operation.items():
        ended = [fate[name] for name in names]
        flops = costs.evaluate(costs.total(nodes[name] for name in names).flops, values)
        rows.append(
            OperationCount(
                operation,
                captured=len(names),
                rewritten=ended.count("rewritten"),
                hoisted=ended.count("hoisted"),
                fused=ended.count("fused"),
                kept=ended.count("kept"),
                refused=ended.count("refused"),
                share=_share(flops, everything),
            )
        )
    return tuple(sorted(rows, key=lambda row: (-row.share, -row.captured, row.operation)))


def _refusals(
    program: CompiledProgram, nodes: Mapping[str, Cost], values: Values, everything: tuple[int, int]
) -> tuple[Refusal, ...]:
    captured = {node.name: node for node in program.captured.graph.nodes}
    rows = []
    for name, path, operation, reason in program.refusals:
        flops, moved = nodes[name].at(values)
        share = _share(flops, everything[0]) if flops else _share(moved, everything[1])
        source = str(captured[name].meta.get("source") or "")
        rows.append(Refusal(name, path, source, operation, reason, share, "FLOPs" if flops else "bytes"))
    return tuple(sorted(rows, key=lambda row: (row.of != "FLOPs", -row.share)))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _levels(executable: Executable, plan: SitePlan, setting: Setting) -> tuple[LevelRows, ...]:
    sizes = executable.plans.block_sizes
    estimates = sizes.estimates(plan, setting.batch, setting.element_size, setting.device)
    rows = []
    for level in sorted(plan.active):
        height, width = plan.size(level)
        size = plan.block_size(level) if level in sizes.levels else None
        rows.append(LevelRows(level, height * width, plan.rows(level), size, dict(estimates.get(level, {}))))
    return tuple(rows)


def _slots(program: CompiledProgram, values: Values) -> tuple[SlotBytes, ...]:
    loaded = [node for node in program.update.nodes if slot_of(node)]
    stored = {slot_of(node): nbytes(spec_of(node)) for node in loaded}
    kinds: dict[str, list[Slot]] = {}
    for slot in program.slots:
        kinds.setdefault(slot.kind.name, []).append(slot)
    rows = []
    for kind, slots in kinds.items():
        formula = costs.total(Cost(nbytes=stored[slot.name]) for slot in slots).nbytes
        rows.append(SlotBytes(kind, len(slots), formula, costs.evaluate(formula, values)))
    return tuple(rows)


def _work(
    program: CompiledProgram,
    dense: Cost,
    values: Values,
    setting: Setting,
    plan: SitePlan | None,
    measured: Sequence[Measured],
    reuse: ReusePlan | None,
) -> tuple[Work, ...]:
    step = costs.graph_cost(program.step)
    flops, moved = dense.at(values)
    rows = [Work("dense", "every call", dense, flops, moved, _comparable(measured, "dense", 1.0, setting))]
    if plan is None:
        rows.append(Work("step", "every call", step, None, None))
    else:
        flops, moved = step.at({**values, **costs.plan_sizes(program.step, plan)})
        timed = _comparable(measured, "sparse", plan.area, setting)
        rows.append(Work("step", "every call", step, flops, moved, timed))
    if _is_on(program, reuse):
        shallow = costs.graph_cost(program.reuse.shallow)
        when = "in place of a step" if reuse is None else f"in {sum(reuse.shallow)} of {len(reuse.shallow)} calls"
        if plan is None:
            rows.append(Work("shallow step", when, shallow, None, None))
        else:
            flops, moved = shallow.at({**values, **costs.plan_sizes(program.reuse.shallow, plan)})
            timed = _comparable(measured, "shallow", plan.area, setting)
            rows.append(Work("shallow step", when, shallow, flops, moved, timed))
    graphs = [bundle.graph for bundle in program.bundles]
    specs = costs.placeholder_specs(program.captured.graph, graphs)
    for bundle in program.bundles:
        cost = costs.graph_cost(bundle.graph, specs)
        inputs = " or ".join(bundle.ordered) or "a weight"
        flops, moved = cost.at(values)
        rows.append(Work(f"hoisted: {bundle.name}", f"when {inputs} changes", cost, flops, moved))
    return tuple(rows)


def _is_on(program: CompiledProgram, reuse: ReusePlan | None) -> bool:
    asked = program.config.reuse if reuse is None else reuse.asked
    return asked != "off" and not isinstance(program.cut, str)


def _reuse(program: CompiledProgram, reuse: ReusePlan | None) -> str:
    if isinstance(program.cut, str):
        return f"nothing can be reused across steps: {program.cut}"
    place = f"a call can take {program.cut.place} from an earlier one"
    if not _is_on(program, reuse):
        return f"{place}; reuse is off"
    if reuse is None:
        return f"{place}; reuse={program.config.reuse!r}"
    calls = ", ".join(str(number) for number, shallow in enumerate(reuse.shallow) if shallow)
    count = f"{sum(reuse.shallow)} of {len(reuse.shallow)} calls do" + (f" (numbers {calls})" if calls else "")
    return f"{place}; up to a movement of {reuse.tolerance:g} {count}"


def _kernels(
    executable: Executable, values: Values, setting: Setting, plan: SitePlan | None
) -> tuple[OperationKernel, ...]:
    program = executable.program
    if plan is not None:
        sizes = costs.plan_sizes(program.step, plan)
    else:
        sites = {level: setting.height / level * setting.width / level for level in program.levels}
        sizes = {row_symbol(level): int(count) for level, count in sites.items()}
    lowered = executable.backend.refused is None and executable.config.backend_on(setting.device) == "inductor"
    return operation_kernels(program.step, plan, {**values, **sizes}, setting.device, lowered=lowered)


def _comparable(measured: Iterable[Measured], kind: str, area: float, setting: Setting) -> Measured | None:
    wanted = (kind, setting.batch, setting.height, setting.width)
    for calls in measured:
        same = (calls.kind, calls.batch, calls.height, calls.width) == wanted
        if same and abs(calls.area - area) < 1e-9 and calls.device.split(":")[0] == setting.device:
            return calls
    return None
