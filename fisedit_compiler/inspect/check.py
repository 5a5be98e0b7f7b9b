"""``compiled.check(mask)``: the pinned and the packed program side by side, and the first node at which they part.

Judged are, in this order: what a recording holds, hoisted values as the module's own cache gives them, every node of
the sparse step, its outputs, and at last the step as the module runs it. The step's graph is interpreted, so what
Inductor makes of it on a GPU is not part of a check. Finding the pass at fault is ``bisect.py``'s business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fisedit_compiler.errors import ConfigError, MaskError, RecordingError
from fisedit_compiler.inspect.judge import (
    Difference,
    Expectations,
    Judge,
    JudgedInterpreter,
    Stopped,
    origins_of_inputs,
)
from fisedit_compiler.inspect.pinned import PinnedInterpreter, PinnedValue, inputs_of
from fisedit_compiler.inspect.samples import call_before, edited_inputs, sample_inputs, scalars_of
from fisedit_compiler.inspect.stages import choose_program
from fisedit_compiler.layout import Layout
from fisedit_compiler.masks import to_site_mask
from fisedit_compiler.program import CompiledProgram
from fisedit_compiler.runtime.hoisting import HoistCache
from fisedit_compiler.runtime.recording import Recording
from fisedit_compiler.runtime.site_plan import SitePlan

if TYPE_CHECKING:
    from rich.table import Table

    from fisedit_compiler.runtime.executable import Executable
    from fisedit_compiler.runtime.module import SparseModule

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


@dataclass(frozen=True)
class Subject:
    """Two calls to check one program with.

    Attributes:
        executable: the program.
        mask: bool ``[H, W]``, not yet grown by the configuration's dilation.
        plan: the site plan of the mask.
        base: the base call's tensors by placeholder name.
        edited: the edit's.
        recorded: slots of a recording to check instead of a fresh one.
        tolerance: relative to a value's largest element; ``None`` for that of its precision.
        seed: of everything random.
    """

    executable: Executable
    mask: Tensor
    plan: SitePlan
    base: Mapping[str, Tensor]
    edited: Mapping[str, Tensor]
    recorded: Mapping[str, Tensor] | None
    tolerance: float | None
    seed: int

    def of(self, executable: Executable) -> Subject:
        """The same calls for another program of the same captured graph, on a fresh recording."""
        plan = _plan(executable, self.mask, self.base[executable.program.spatial[0]])
        return replace(self, executable=executable, plan=plan, recorded=None)

    def __str__(self) -> str:
        config, sites = self.executable.program.config, self.plan.height * self.plan.width
        return (
            f"{self.plan.rows(Fraction(1))} of {sites} sites active, norm={config.norm!r}, "
            f"attention={config.attention!r}"
        )


def make_subject(
    module: SparseModule,
    mask: Any,
    *,
    inputs: Mapping[str, Any] | None = None,
    edited: Mapping[str, Any] | None = None,
    recording: Recording | None = None,
    call: int = 0,
    program: int = 0,
    tolerance: float | None = None,
    seed: int = 0,
) -> Subject:
    """The calls and the plan of a check; see :meth:`SparseModule.check` for arguments and errors."""
    if inputs is None and (edited is not None or recording is not None):
        given = "edited" if edited is not None else "recording"
        raise ConfigError(
            f"check() was given {given}= without inputs=; pass the keyword arguments of the base call as inputs=, so "
            "that there is something to compare with."
        )
    if tolerance is not None and not tolerance >= 0.0:
        raise ConfigError(f"tolerance={tolerance!r} must be a relative error, 0 or more, or None.")
    generator = torch.Generator().manual_seed(seed)
    if inputs is None:
        choose_program(module.programs, program)
        executable = module._programs.executables()[program]
        sites = _own_size(mask, executable.program.multiple)
        height, width = sites.shape
        base = sample_inputs(executable.program, height, width, generator)
    else:
        bound, _ = module._programs.bind((), inputs)
        executable, base = bound.executable, dict(bound.tensors)
        sites = to_site_mask(mask, *bound.sample.shape[2:])
    sites = sites.cpu()
    if not bool(sites.any()):
        raise MaskError("The mask is empty: an edit gives the recorded outputs back, and there is nothing to check.")
    plan = _plan(executable, sites, base[executable.program.spatial[0]])
    if edited is None:
        changed = edited_inputs(executable.program, base, plan, generator)
    else:
        other, _ = module._programs.bind((), edited)
        changed = dict(other.tensors)
        _check_alike(executable.program, base, changed, same_program=other.executable is executable)
    recorded = None if recording is None else _recorded(recording, call, executable, base)
    return Subject(executable, sites, plan, base, changed, recorded, tolerance, seed)


def check_subject(subject: Subject, hoisted: HoistCache) -> CheckReport:
    """Run both programs.

    Args:
        subject: what to check.
        hoisted: cache of hoisted values; used as it is, so pass a fork of one that must not change.
    """
    executable, plan = subject.executable, subject.plan
    program = executable.program
    judge = Judge(program, plan, subject.tolerance)
    expected = Expectations(program, plan)
    with torch.no_grad():
        pinned = PinnedInterpreter(program, executable.module, plan, expected.observe)
        outputs = pinned.run(*inputs_of(program, subject.base, subject.edited))
        try:
            slots = _judge_slots(subject, judge, expected)
            values = _judge_hoisted(subject, judge, expected, hoisted)
            arguments = [_argument(node, subject, slots, values) for node in _placeholders(program.step)]
            step = JudgedInterpreter(program.step, program, executable.module, judge, expected)
            found = list(step.run(*arguments))[: len(program.outputs)]
            _judge_outputs(program, judge, "output", found, outputs)
            device_type = subject.base[program.spatial[0]].device.type
            if not judge.differences and executable.config.backend_on(device_type) == "eager":
                _judge_outputs(program, judge, "output of the running step", _run(subject, slots, hoisted), outputs)
        except Stopped:
            pass  # the judge has noted where
    return CheckReport(judge.sorted(), judge.compared, str(subject))


def _judge_slots(subject: Subject, judge: Judge, expected: Expectations) -> dict[str, Tensor]:
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
        origin = readers.get(("slot", slot.name), slot.origin)
        wanted, value = expected.slots[slot.name], recorded.get(slot.name)
        layout = slot.layout if slot.kind == "dense" else None
        agrees = judge.close(origin, f"slot {slot.name}", value, wanted, layout)
        right[slot.name] = value if agrees and value is not None else wanted
    # Outside the mask an output must be the recorded one to the last bit, so the judge has to know that very tensor.
    expected.slots.update(right)
    return right


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
        arguments = [
            batch if kind == "batch" else (right if kind == "hoisted" else subject.edited)[rest[0]]
            for kind, *rest in (node.meta["input"] for node in _placeholders(bundle.graph))
        ]
        right.update(zip(bundle.values, interpreter.run(*arguments), strict=True))
    before = call_before(program, subject.edited, torch.Generator().manual_seed(subject.seed + 1))
    cached: Mapping[str, Tensor] = {}
    for tensors in (before, subject.edited):
        cached = hoisted.evaluate(executable._bundle_modules(), tensors, batch, scalars_of(program, tensors))
    readers = origins_of_inputs(program.step)
    for name, value in right.items():
        origin = readers.get(("hoisted", name))
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


def _run(subject: Subject, slots: Mapping[str, Tensor], hoisted: HoistCache) -> list[Any]:
    """The step as an edit runs it."""
    executable = subject.executable
    scalars = scalars_of(executable.program, subject.edited)
    with _hoisting_by(executable, hoisted):
        return executable.step(subject.edited, slots, subject.plan, update=False, scalars=scalars)[0]


@contextmanager
def _hoisting_by(executable: Executable, hoisted: HoistCache) -> Iterator[None]:
    own, executable.hoisted = executable.hoisted, hoisted
    try:
        yield
    finally:
        executable.hoisted = own


def _argument(node: fx.Node, subject: Subject, slots: Mapping[str, Tensor], hoisted: Mapping[str, Tensor]) -> Tensor:
    kind, *rest = node.meta["input"]
    if kind == "table":
        table: Tensor = getattr(subject.plan, rest[0])[rest[1]]
        return table
    return {"call": subject.edited, "slot": slots, "hoisted": hoisted}[kind][rest[0]]


def _placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def _plan(executable: Executable, mask: Tensor, sample: Tensor) -> SitePlan:
    """As the executable makes it, without being kept there, and with the levels of values that stay dense."""
    program = executable.program
    layouts = [node.meta.get("layout") for node in program.captured.graph.nodes]
    dense = {layout.level for layout in layouts if isinstance(layout, Layout) and layout.is_rows}
    levels = program.levels | {level for level in dense if level is not None}
    plan = SitePlan.build(mask, levels, program.convs, dilation=executable.config.dilation)
    return executable.divided(plan, sample.shape[0], sample.element_size(), sample.device.type).to(sample.device)


def _own_size(mask: Any, multiple: int) -> Tensor:
    """The mask at its own size, which is the size of the call that is made up."""
    if isinstance(mask, (str, Path)):
        raise MaskError("A mask that is a file has no size of its own here; open it, or pass inputs= as well.")
    size = getattr(mask, "shape", None)
    height, width = size[-2:] if size is not None and len(size) >= 2 else reversed(getattr(mask, "size", (1, 1)))
    sites = to_site_mask(mask, int(height), int(width))
    if height % multiple or width % multiple:
        raise MaskError(
            f"The mask is {height}x{width}, but the model scales its maps down to 1/{multiple}: both sizes must be "
            f"multiples of {multiple}."
        )
    return sites


def _check_alike(
    program: CompiledProgram, base: Mapping[str, Tensor], edited: Mapping[str, Tensor], *, same_program: bool
) -> None:
    """Two calls that no edit could pair are refused.

    Raises:
        RecordingError: arguments or shapes differ.
    """
    shapes = {name: (tuple(base[name].shape), tuple(edited[name].shape)) for name in base if name in edited}
    spatial = {name: pair for name, pair in shapes.items() if name in program.spatial and pair[0] != pair[1]}
    if not same_program or spatial:
        found = "; ".join(f"{name}: {list(then)} and {list(now)}" for name, (then, now) in spatial.items())
        raise RecordingError(
            f"inputs= and edited= are calls of other shapes or arguments ({found or 'other arguments'}). Pass the two "
            "calls of one edit."
        )


def _recorded(
    recording: Recording, call: int, executable: Executable, base: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """The slots of the recorded call to check.

    Whether they are of these weights and inputs is what the check finds out.

    Raises:
        RecordingError: there is no such call, or it is of another program, size or batch.
    """
    if not 0 <= call < recording.num_calls:
        raise RecordingError(f"The recording has {recording.num_calls} calls; there is no call {call}.")
    record = recording.calls[call]
    sample = base[executable.program.spatial[0]]
    recorded = (record.batch, record.height, record.width)
    given = (sample.shape[0], *sample.shape[2:])
    if record.signature != executable.program.signature or recorded != given:
        raise RecordingError(
            f"Call {call} of the recording has batch, height and width {recorded}, inputs= has {given}, or other "
            "arguments. Pass the arguments of that call."
        )
    return record.slots
