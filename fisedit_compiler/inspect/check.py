"""``compiled.check(mask)``: the pinned and the packed program side by side, and the first node at which they part.

Judged are, in this order: what a recording holds, hoisted values as the module's own cache gives them, every node of
the sparse step, its outputs, and at last the step as the module runs it, also as an edit that records itself, and cut
in two where the configuration reuses values across steps. The step's graph is interpreted; what Inductor and CUDA
graphs make of it is compared if asked for (``lowered.py``). Finding the pass at fault is ``bisect.py``'s business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fisedit_compiler.errors import LoweringError
from fisedit_compiler.graph.inputs import HoistedInput, SlotInput, Sources, graph_inputs, resolve
from fisedit_compiler.inspect.example_inputs import call_before, scalars_of
from fisedit_compiler.inspect.judge import (
    Difference,
    Expectations,
    Judge,
    JudgedInterpreter,
    Stopped,
    origins_of_inputs,
)
from fisedit_compiler.inspect.lowered import NOT_COMPILATION, judge_lowered_nodes
from fisedit_compiler.inspect.pinned import PinnedInterpreter, PinnedValue, inputs_of
from fisedit_compiler.inspect.subject import Subject
from fisedit_compiler.lowering.program import CompiledProgram
from fisedit_compiler.recordings.stores import SlotStore, hold
from fisedit_compiler.recordings.turns import after_sparse_call
from fisedit_compiler.runtime.execution.held_rows import HeldRows
from fisedit_compiler.runtime.execution.hoisting import HoistCache
from fisedit_compiler.slots.turn import Turn

if TYPE_CHECKING:
    from rich.table import Table


ROWS_SHOWN = 20


@dataclass(frozen=True)
class CheckReport:
    """What a check found; true if nothing differs.

    Attributes:
        differences: every value that differs on right inputs, in the order of the captured graph.
        compared: number of values that were compared.
        subject: what was checked, in words.
    """

    differences: tuple[Difference, ...]
    compared: int
    subject: str

    @property
    def ok(self) -> bool:
        """Whether the packed program equals the pinned one."""
        return not self.differences

    @property
    def first(self) -> Difference | None:
        """The first node that differs, in the order of the captured graph."""
        return self.differences[0] if self.differences else None

    def __bool__(self) -> bool:
        return self.ok

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(title=f"{len(self.differences)} of {self.compared} values differ")
        for column in ("node", "operation", "module", "value", "error", "allowed"):
            table.add_column(column, justify="right" if column in ("error", "allowed") else "left", overflow="fold")
        for item in self.differences[:ROWS_SHOWN]:
            error = item.problem or f"{item.error:.2e}"
            table.add_row(item.node, item.operation, item.path, item.what, error, f"{item.allowed:.2e}")
        if len(self.differences) > ROWS_SHOWN:
            table.add_row(f"and {len(self.differences) - ROWS_SHOWN} more", "", "", "", "", "")
        return table

    def __str__(self) -> str:
        from rich.console import Console

        if self.first is None:
            return f"the packed program equals the pinned one: {self.compared} values compared, {self.subject}"
        console = Console(width=160, color_system=None)
        with console.capture() as captured:
            console.print(self)
        return f"first difference: {self.first}\n{self.subject}\n{captured.get()}"


def check_subject(subject: Subject, hoisted: HoistCache) -> CheckReport:
    """Run both programs.

    Args:
        subject: what to check.
        hoisted: cache of hoisted values; used as it is, so pass a fork of one that must not change.
    """
    executable, plan = subject.executable, subject.plan
    program = executable.program
    judge = Judge(program, plan, subject.options.tolerance)
    expected = Expectations(program, plan)
    with torch.no_grad():
        pinned = PinnedInterpreter(program, executable.module, plan, expected.observe)
        outputs = pinned.run(*inputs_of(program, subject.base, subject.edited))
        try:
            slots = _judge_slots(subject, judge, expected)
            values = _judge_hoisted(subject, judge, expected, hoisted)
            sources = Sources(subject.edited, slots, values, plan)
            arguments = resolve(graph_inputs(program.step), sources)
            step = JudgedInterpreter(program.step, program, executable.module, judge, expected)
            found = list(step.run(*arguments))[: len(program.outputs)]
            _judge_outputs(program, judge, "output", found, outputs)
            if judge.differences:
                raise Stopped
            if not executable.is_lowered(subject.edited):
                found, _ = _run(subject, slots, hoisted)
                _judge_outputs(program, judge, "output of the running step", found, outputs)
            elif subject.options.lowered:
                _judge_lowered(subject, judge, sources, slots, hoisted, outputs)
            if not judge.differences and subject.runs_updates:
                found, after = _run(subject, slots, hoisted, update=True)
                _judge_outputs(program, judge, "output of an edit that records", found, outputs)
                _judge_edited_slots(program, judge, expected, after)
            if not judge.differences and subject.reuses:
                for what, found in _run_cut(subject, slots, hoisted):
                    _judge_outputs(program, judge, what, found, outputs)
        except Stopped:
            pass  # the judge has noted where, and what follows would only echo it
    return CheckReport(judge.sorted(), judge.compared, str(subject))


def _judge_slots(subject: Subject, judge: Judge, expected: Expectations) -> SlotStore:
    """The right recording, after noting what a given or a fresh one has wrong."""
    executable = subject.executable
    recorded = subject.recorded
    if recorded is None:
        try:
            recorded = executable.record(subject.base)[1]
        except Exception as error:
            judge.note("recording", "call", problem=f"{type(error).__name__}: {error}")
            raise Stopped from error
    readers = origins_of_inputs(executable.program.step)
    right = {}
    for slot in executable.program.slots:
        origin = readers.get(SlotInput(slot.name), slot.origin)
        agrees = judge.close_slot(origin, f"slot {slot.name}", slot, recorded, expected.slots)
        right[slot.name] = (recorded if agrees else expected.slots)[slot.name]
    # Outside the mask an output must be the recorded one to the last bit, so the judge has to know that very tensor.
    expected.slots.update(right)
    return hold(right)


def _judge_hoisted(subject: Subject, judge: Judge, expected: Expectations, hoisted: HoistCache) -> dict[str, Tensor]:
    """The right hoisted values, after noting which of them the cache has wrong.

    The cache is asked for another call first, as in a run whose prompt or timestep changes.
    """
    executable = subject.executable
    program = executable.program
    right: dict[str, Tensor] = {}
    batch = subject.base[program.spatial[0]].shape[0]
    for bundle in program.bundles:
        interpreter = JudgedInterpreter(bundle.graph, program, executable.module, judge, expected)
        arguments = resolve(bundle.inputs, Sources(call=subject.edited, hoisted=right, batch=batch))
        right.update(zip(bundle.values, interpreter.run(*arguments), strict=True))
    before = call_before(program, subject.edited, torch.Generator().manual_seed(subject.options.seed + 1))
    cached: Mapping[str, Tensor] = {}
    for tensors in (before, subject.edited):
        cached = hoisted.evaluate(executable._bundle_modules(), tensors, batch, scalars_of(program, tensors))
    readers = origins_of_inputs(program.step)
    for name, value in right.items():
        origin = readers.get(HoistedInput(name))
        if origin is not None:
            what = f"hoisted {name}: the cached value is not that of these inputs and weights"
            judge.close(origin, what, cached.get(name), value)
    return right


def _judge_outputs(
    program: CompiledProgram, judge: Judge, what: str, found: list[Any], outputs: tuple[PinnedValue, ...]
) -> None:
    origins = _output_nodes(program)
    for number, (node, value, wanted) in enumerate(zip(origins, found, outputs, strict=True)):
        if isinstance(value, Tensor) and isinstance(node, fx.Node):
            right = wanted.pinned if node.meta.get("varies") else wanted.dense
            judge.close(node.name, f"{what} {number}", value, right, judge.layout_of(node.name))


def _output_nodes(program: CompiledProgram) -> tuple[Any, ...]:
    flat = next(node for node in program.captured.graph.nodes if node.op == "output").args[0]
    return tuple(flat) if isinstance(flat, (list, tuple)) else (flat,)


def _judge_lowered(
    subject: Subject,
    judge: Judge,
    sources: Sources,
    slots: SlotStore,
    hoisted: HoistCache,
    outputs: tuple[PinnedValue, ...],
) -> None:
    """The step as Inductor and CUDA graphs run it; of one that differs, the first node that does."""
    program = subject.executable.program
    try:
        found, _ = _run(subject, slots, hoisted, strict=True)
    except LoweringError as error:
        judge.note(error.node or "the step", "lowering", problem=str(error).splitlines()[0])
        return
    trial = Judge(program, subject.plan, subject.options.tolerance)
    _judge_outputs(program, trial, "output", found, outputs)
    if not trial.differences:
        judge.compared += trial.compared
        return
    step = subject.executable.interpreted_step()
    known = judge_lowered_nodes(step, resolve(graph_inputs(step.graph), sources), judge)
    _judge_outputs(program, judge, f"lowered step{'' if known else f' ({NOT_COMPILATION})'}, output", found, outputs)


def _judge_edited_slots(
    program: CompiledProgram, judge: Judge, expected: Expectations, after: Mapping[str, Tensor]
) -> None:
    """What an edit that records itself leaves for an edit of the edit: every slot, as the pinned program has it."""
    readers = origins_of_inputs(program.step)
    for slot in program.slots:
        origin = readers.get(SlotInput(slot.name), slot.origin)
        judge.close_slot(origin, f"slot {slot.name} after the edit", slot, after, expected.edited_slots)


def _run_cut(subject: Subject, slots: SlotStore, hoisted: HoistCache) -> Iterator[tuple[str, list[Any]]]:
    """The outputs of the cut step: of a full call, and of a shallow one that takes what the full one kept.

    Both are the same call, so nothing has moved in between, and both must give what the step gives.
    """
    executable, held = subject.executable, HeldRows()
    scalars = scalars_of(executable.program, subject.edited)
    for what, shallow in (("output of a full call", False), ("output of a shallow call", True)):
        outputs, _ = executable.step(
            subject.edited,
            slots,
            subject.plan,
            update=False,
            scalars=scalars,
            hoisted=hoisted,
            held=held,
            shallow=shallow,
        )
        yield what, outputs


def _run(
    subject: Subject, slots: SlotStore, hoisted: HoistCache, *, update: bool = False, strict: bool = False
) -> tuple[list[Any], Mapping[str, Tensor]]:
    """The step as an edit runs it: its outputs, and with ``update`` every slot after the edit."""
    executable = subject.executable
    scalars = scalars_of(executable.program, subject.edited)
    outputs, updates = executable.step(
        subject.edited, slots, subject.plan, update=update, scalars=scalars, strict=strict, hoisted=hoisted
    )
    if not update:
        return outputs, {}
    return outputs, after_sparse_call(executable.program, slots, Turn(subject.plan.active), updates)
