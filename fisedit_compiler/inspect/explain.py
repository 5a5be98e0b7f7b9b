"""What ``compiled.explain()`` gives: what became of every operation, rows and blocks per level, bytes and FLOPs.

An explanation holds numbers, reasons and formulas; ``tables.py`` draws it, ``costs.py`` knows what operations cost.
Making one reads the program and, for a mask, builds its site plan; nothing is compiled or run.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import sympy
from torch import fx

from fisedit_compiler import ir
from fisedit_compiler.errors import PlanError
from fisedit_compiler.inspect import costs
from fisedit_compiler.inspect.costs import Cost, Values
from fisedit_compiler.runtime.site_plan import SitePlan

if TYPE_CHECKING:
    from rich.console import Group

    from fisedit_compiler.passes.base import Slot
    from fisedit_compiler.program import CompiledProgram
    from fisedit_compiler.runtime.executable import Executable

Fate = Literal["rewritten", "hoisted", "fused", "kept", "refused"]
TEXT_TOKENS = 77
"""Tokens of a prompt that formulas are evaluated for, where no other number is given."""


@dataclass(frozen=True)
class OperationCount:
    """How many nodes of one operation were captured, and what became of them; the five others add up to ``captured``.

    Attributes:
        operation: such as ``aten.conv2d``.
        captured: nodes of the dense graph.
        rewritten: in the step, on rows of the active sites.
        hoisted: moved out of the step, since they depend on neither image nor recording.
        fused: nothing of their own is left: another operation does their work (an upsampling is in the tables of the
            next convolution, sibling linear layers are in the first of them), or none has to (an order of axes that
            rows have anyway).
        kept: in the step as they were: sizes, and what depends on the image and has no sites.
        refused: dense between a scatter and a gather, for a reason.
        share: of the dense call's FLOPs, in [0, 1].
    """

    operation: str
    captured: int
    rewritten: int
    hoisted: int
    fused: int
    kept: int
    refused: int
    share: float


@dataclass(frozen=True)
class Refusal:
    """An operation that stays dense.

    Attributes:
        node: its name in the captured graph.
        path: the module in the user's model.
        source: file, line and code in the user's model, where known.
        operation: such as ``aten.cumsum``.
        reason: why it stays dense.
        share: of the dense call's FLOPs, or of its bytes for an operation without FLOPs, in [0, 1].
        of: which of the two.
    """

    node: str
    path: str
    source: str
    operation: str
    reason: str
    share: float
    of: Literal["FLOPs", "bytes"]


@dataclass(frozen=True)
class LevelRows:
    """One level of a site plan.

    Attributes:
        level: 1 is the latent's resolution, 2 half of it.
        sites: all sites.
        active: sites that are computed.
        block_size: sites along the side of a block of its convolutions; ``None`` if none can be computed in blocks.
        estimates: microseconds of all its convolutions by block size, where somebody measured.
    """

    level: Fraction
    sites: int
    active: int
    block_size: int | None
    estimates: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SlotBytes:
    """The recorded values of one kind.

    Attributes:
        kind: see :class:`fisedit_compiler.passes.base.Slot`.
        slots: how many.
        formula: bytes a call.
        nbytes: the same, evaluated.
    """

    kind: str
    slots: int
    formula: sympy.Expr
    nbytes: int


@dataclass(frozen=True)
class Measured:
    """Calls of one kind that the last session with such calls timed.

    Attributes:
        kind: ``dense``, ``sparse`` or ``skipped``.
        calls: how many.
        seconds: the median call's wall time; on a CUDA device that of its launch.
        batch: samples of a call.
        height: rows of the spatial input.
        width: columns of the spatial input.
        area: share of active sites; 1 for dense calls.
        device: where they ran.
    """

    kind: str
    calls: int
    seconds: float
    batch: int
    height: int
    width: int
    area: float
    device: str


@dataclass(frozen=True)
class Work:
    """What one graph costs; see ``costs.py`` for what is counted.

    Attributes:
        name: ``dense`` (the captured graph), ``step`` (the sparse one), or the name of a bundle of hoisted values.
        when: how often it runs.
        cost: formulas.
        flops: evaluated; ``None`` for what depends on a mask, without one.
        nbytes: likewise.
        measured: calls of this kind, size, batch and area that were timed.
    """

    name: str
    when: str
    cost: Cost
    flops: int | None
    nbytes: int | None
    measured: Measured | None = None


@dataclass(frozen=True)
class Setting:
    """The call that formulas are evaluated for.

    Attributes:
        height: rows of the spatial input.
        width: columns of the spatial input.
        batch: samples of a call.
        tokens: tokens of a prompt.
        element_size: bytes of a parameter's element.
        device: ``torch.device.type`` of where calls run.
        calls: calls of a recording, where one was made.
    """

    height: int
    width: int
    batch: int
    tokens: int
    element_size: int
    device: str
    calls: int | None = None


@dataclass(frozen=True)
class ProgramExplanation:
    """One program, for one call.

    Attributes:
        inputs: names of the spatial inputs.
        setting: the call that formulas are evaluated for.
        convolutions: number of sparse convolutions.
        operations: what became of every operation, the costliest first.
        refusals: every operation that stays dense, the costliest first.
        area: share of active sites; ``None`` without a mask.
        levels: rows and block sizes, finest level first; none without a mask.
        slots: recorded bytes by kind of slot.
        work: FLOPs and bytes of the dense call, of the step, and of what is hoisted.
    """

    inputs: tuple[str, ...]
    setting: Setting
    convolutions: int
    operations: tuple[OperationCount, ...]
    refusals: tuple[Refusal, ...]
    area: float | None
    levels: tuple[LevelRows, ...]
    slots: tuple[SlotBytes, ...]
    work: tuple[Work, ...]

    @property
    def recorded_bytes(self) -> int:
        """Bytes that a recording holds per call."""
        return sum(kind.nbytes for kind in self.slots)


@dataclass(frozen=True)
class Explanation:
    """What was compiled, and what it costs. Prints as tables (``rich.print``, ``print``, notebooks).

    Attributes:
        programs: one per call signature.
        note: what stands in the way of more, or how calls run, as a sentence; empty if there is nothing to say.
        measured: calls that the last sessions timed, by kind.
    """

    programs: tuple[ProgramExplanation, ...] = ()
    note: str = ""
    measured: tuple[Measured, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings, lists and dictionaries that ``json.dumps`` takes; formulas as strings."""
        converted: dict[str, Any] = _plain(asdict(self))
        for program, made in zip(converted["programs"], self.programs, strict=True):
            program["recorded_bytes"] = made.recorded_bytes
        return converted

    def __rich__(self) -> Group:
        from fisedit_compiler.inspect import tables

        return tables.drawn(self)

    def __str__(self) -> str:
        from fisedit_compiler.inspect import tables

        return tables.as_text(self)

    def _repr_html_(self) -> str:
        from fisedit_compiler.inspect import tables

        return tables.as_html(self)


def explain_program(
    executable: Executable, setting: Setting, plan: SitePlan | None = None, measured: Iterable[Measured] = ()
) -> ProgramExplanation:
    """Explain one program for one call.

    Args:
        executable: the program, bound.
        setting: the call.
        plan: a plan in blocks of the mask, on any device.
        measured: calls that were timed; those that are comparable are put beside the costs.

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
        work=_work(program, dense, values, setting, plan, tuple(measured)),
    )


def default_size(module: Any, multiple: int) -> tuple[int, int]:
    """Height and width to explain a module for if nobody names any: its config's, or eight times what it divides by."""
    config = getattr(module, "config", None)
    size: Any = getattr(config, "sample_size", None)
    height, width = size if isinstance(size, (list, tuple)) and len(size) == 2 else (size, size)
    if all(isinstance(sites, int) and sites > 0 and sites % multiple == 0 for sites in (height, width)):
        return height, width
    return 8 * multiple, 8 * multiple


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
    sizes = executable.block_sizes
    estimates = sizes.estimates(plan, setting.batch, setting.element_size, setting.device)
    rows = []
    for level in sorted(plan.active):
        height, width = plan.size(level)
        size = plan.block_size(level) if level in sizes.levels else None
        rows.append(LevelRows(level, height * width, plan.rows(level), size, dict(estimates.get(level, {}))))
    return tuple(rows)


def _slots(program: CompiledProgram, values: Values) -> tuple[SlotBytes, ...]:
    loaded = [node for node in program.update.nodes if node.op == "placeholder" and node.meta["input"][0] == "slot"]
    nbytes = {node.meta["input"][1]: costs.nbytes(ir.spec_of(node)) for node in loaded}
    kinds: dict[str, list[Slot]] = {}
    for slot in program.slots:
        kinds.setdefault(slot.kind, []).append(slot)
    rows = []
    for kind, slots in kinds.items():
        formula = costs.total(Cost(nbytes=nbytes[slot.name]) for slot in slots).nbytes
        rows.append(SlotBytes(kind, len(slots), formula, costs.evaluate(formula, values)))
    return tuple(rows)


def _work(
    program: CompiledProgram,
    dense: Cost,
    values: Values,
    setting: Setting,
    plan: SitePlan | None,
    measured: Sequence[Measured],
) -> tuple[Work, ...]:
    step = costs.graph_cost(program.step)
    flops, nbytes = dense.at(values)
    rows = [Work("dense", "every call", dense, flops, nbytes, _comparable(measured, "dense", 1.0, setting))]
    if plan is None:
        rows.append(Work("step", "every call", step, None, None))
    else:
        flops, nbytes = step.at({**values, **costs.plan_sizes(program.step, plan)})
        timed = _comparable(measured, "sparse", plan.area, setting)
        rows.append(Work("step", "every call", step, flops, nbytes, timed))
    graphs = [bundle.graph for bundle in program.bundles]
    specs = costs.placeholder_specs(program.captured.graph, graphs)
    for bundle in program.bundles:
        cost = costs.graph_cost(bundle.graph, specs)
        inputs = " or ".join(bundle.ordered) or "a weight"
        flops, nbytes = cost.at(values)
        rows.append(Work(f"hoisted: {bundle.name}", f"when {inputs} changes", cost, flops, nbytes))
    return tuple(rows)


def _comparable(measured: Iterable[Measured], kind: str, area: float, setting: Setting) -> Measured | None:
    wanted = (kind, setting.batch, setting.height, setting.width)
    for calls in measured:
        same = (calls.kind, calls.batch, calls.height, calls.width) == wanted
        if same and abs(calls.area - area) < 1e-9 and calls.device.split(":")[0] == setting.device:
            return calls
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, (sympy.Basic, Fraction)) else value
