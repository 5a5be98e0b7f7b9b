"""Whether a program computes what its module computes: found out while a run is recorded.

The key of a program says what was captured; this check does not trust it. The module itself is called with the same
arguments, and its outputs are compared bit for bit: at the first call of every recording, at every new set of sizes,
and at every call if the module keeps what changes from call to call. A difference means another capture, a second one
an error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fisedit_compiler.capture.keys.notes import Notes, describe
from fisedit_compiler.capture.keys.snapshot import Snapshot
from fisedit_compiler.compiling import alone
from fisedit_compiler.errors import CaptureError
from fisedit_compiler.runtime.calls.call import Call
from fisedit_compiler.runtime.calls.programs import ProgramStore
from fisedit_compiler.runtime.execution.executable import Executable
from fisedit_compiler.runtime.sessions.left_behind import left_behind

logger = logging.getLogger(__name__)

Recorded = tuple[list[Any], dict[str, Tensor]]


def form_of(call: Call) -> tuple[Any, ...]:
    """What of a call's tensors a forward may branch on without reading them: a capture follows one of its ways."""
    return tuple((tuple(tensor.shape), tensor.is_contiguous()) for tensor in call.tensors.values())


@dataclass(frozen=True)
class Checked:
    """A recorded call that is the module's own.

    Attributes:
        executable: of the program that computes it.
        recorded: its outputs and slots.
        is_compiled: whether they are those of compiled code.
    """

    executable: Executable
    recorded: Recorded
    is_compiled: bool = False


def record_checked(
    programs: ProgramStore, call: Call, *, maps: bool, may_capture: bool = True, compiled: bool = False
) -> Checked:
    """Record a call and compare it with the module's own, which runs beside it.

    A program that was right at these sizes before is compared beside what other threads do. Otherwise nobody computes
    meanwhile: what the module's forward writes is found out by calls that must be the only ones, and a difference by
    another thread's doing is none.

    Args:
        programs: of the module; learns which attributes its forward writes, and captures again where need be.
        call: the first one of its program in a recording, or of other sizes, or of a module that keeps count.
        maps: also record cross-attention maps.
        may_capture: whether another capture may take the program's place; not where a recording holds calls of it.
        compiled: whether compiled code makes such calls. Where it is as close to the module as it was to the
            interpreted graph when they were compared, that is enough.

    Raises:
        CaptureError: the module computes something else than any capture of it, or something else at every call.
    """
    executable = call.executable
    if _is_known(call, executable):
        own, random_state = _own_outputs(programs, call)
        recorded = executable.record(call.tensors, compiled=True) if compiled else None
        if recorded is not None and executable.is_as_close(call.tensors, own, recorded[0]):
            _set_random_state(call, random_state)
            return Checked(executable, recorded, is_compiled=True)
        with _same_random_numbers(call):
            recorded = executable.interpret(call.tensors, maps=maps)
        if not _difference(own, recorded[0]):
            _set_random_state(call, random_state)
            return Checked(executable, recorded)
    return _record_alone(programs, call, maps, may_capture)


def _is_known(call: Call, executable: Executable) -> bool:
    """Whether the program was compared at these sizes, and what its module's forward writes was seen then."""
    return form_of(call) in executable.confirmed and not executable.unsettled


def _record_alone(programs: ProgramStore, call: Call, maps: bool, may_capture: bool) -> Checked:
    with alone():
        return _record_compared(programs, call, maps, may_capture)


def _record_compared(programs: ProgramStore, call: Call, maps: bool, may_capture: bool) -> Checked:
    executable = call.executable
    former, was_right = executable, bool(executable.confirmed)
    own, random_state = _own_outputs(programs, call)
    problem = ""
    for attempt in ("first", "second"):
        with _same_random_numbers(call):
            recorded = executable.interpret(call.tensors, maps=maps)
        problem = _difference(own, recorded[0])
        if not problem:
            executable.confirmed.add(form_of(call))
            if executable is not former and was_right:
                programs.disown(call.structure)  # else recordings of the former program were edited with this one
            _set_random_state(call, random_state)
            return Checked(executable, recorded)
        if attempt == "second" or not may_capture:
            break
        logger.warning("a program does not compute what its module computes (%s): captured again", problem)
        end = Snapshot(programs.module)
        executable = programs.capture_again(call)
        executable.unsettled = former.unsettled
        end.restore(everything=True)
    if was_right and executable is not former:
        programs.put_back(former, instead_of=executable)
    raise CaptureError(_why(programs, call, own, problem, "" if executable is former else ", also when captured again"))


def _why(programs: ProgramStore, call: Call, own: list[Any], problem: str, captured_again: str) -> str:
    name = type(programs.module).__name__
    if call.executable.unsettled:
        return _depends(programs, f"its captured graph does something else{captured_again}: {problem}")
    end = Snapshot(programs.module)
    itself = _difference(own, _run(call))
    end.restore(everything=True)
    if itself:
        return (
            f"{name} computes something else at every call with the same arguments and random state ({itself}). A "
            "recording could not be repeated, nor what is outside a mask be kept. Make its operations deterministic "
            "(torch.use_deterministic_algorithms(True) names those that are not), or sparsify a submodule without them."
        )
    return (
        f"{name} computes something else than its captured graph ({problem}){captured_again}. Its forward reads "
        "something that a graph cannot hold: a branch on sizes (`if height > width`, `if batch == 1`, a text made of a "
        "shape), of which a graph holds one side; a hook that changes results, a global or file that is read at every "
        "call, random numbers of another library. Take that out of the forward, or sparsify the submodule without it."
    )


def _depends(programs: ProgramStore, problem: str, places: Iterable[str] = ()) -> str:
    places = sorted(set(places) or {place for one in programs.executables() for place in one.unsettled})
    return (
        f"{type(programs.module).__name__} may compute something else at every call ({problem}), since its forward "
        f"writes to what it reads: {', '.join(places)}. A recording could not be repeated. Make the forward "
        "independent of what an earlier call left there (the timestep tells which step it is), or pass it as an "
        "argument."
    )


def _own_outputs(programs: ProgramStore, call: Call) -> tuple[list[Any], list[Tensor]]:
    """The module's outputs, and the state of torch's generators after them.

    What its forward only writes is told to ``programs``.
    """
    executable = call.executable
    start = None if _is_known(call, executable) else Snapshot(programs.module)
    with _same_random_numbers(call):
        own = _owned(call.run_original())
        random_state = _random_state(call)
    changes = [] if start is None else start.changes()
    if start is None or not changes:
        return own, random_state
    if executable.unsettled or executable.confirmed:
        # Seen through before: what is new was made for other sizes, or is another of a row.
        known = Notes(programs.state.notes)
        if new := [note for change in changes if not known.cover(change) for note in change.notes()]:
            programs.leave_out(frozenset(new), call.structure)
        return own, random_state
    end = Snapshot(programs.module)
    others = (lambda: _run_on_others(programs, call, _other), lambda: _run_on_others(programs, call, _other_float))
    try:
        found = left_behind(start, own, lambda: _run(call), others, _difference)
        notes = frozenset(note for change in start.changes() for note in change.notes(found.looked_at))
        unsettled = {describe(note) for change in found.unsettled for note in change.notes()}
    finally:
        end.restore(everything=True)  # as if the module had been called once
    if found.problem:
        raise CaptureError(_depends(programs, found.problem, map(describe, notes)))
    programs.leave_out(notes, call.structure)
    executable.unsettled = tuple(sorted(unsettled))
    return own, random_state


def _run(call: Call) -> list[Any]:
    with _same_random_numbers(call):
        return _owned(call.run_original())


def _run_on_others(programs: ProgramStore, call: Call, other: Callable[[Tensor], Tensor]) -> None:
    """Call the module with other inputs of the same shapes."""
    others = pytree.tree_map_only(Tensor, other, call.arguments())
    with _same_random_numbers(call):
        call.ambient.around(programs.module)(**others)


def _other(value: Tensor) -> Tensor:
    if value.dtype is torch.bool:
        return value
    if not value.is_floating_point():
        return value // 2  # a label or a timestep, of which only smaller ones are sure to exist
    return _other_float(value) if value.numel() > 1 and value.dim() > 1 else value * 0.5


def _other_float(value: Tensor) -> Tensor:
    # Numbers that come alone, such as the timestep, may be compared with those of a schedule.
    return value.flip(-1) * 0.5 if value.is_floating_point() and value.numel() > 1 and value.dim() > 1 else value


def _owned(result: Any) -> list[Any]:
    # A module may hand out a buffer that its next call writes to.
    return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in pytree.tree_leaves(result)]


def _difference(own: list[Any], program: list[Any]) -> str:
    """What differs, in words; empty if every bit is equal."""
    if len(own) != len(program):
        return f"{len(own)} outputs instead of {len(program)}"
    for number, (left, right) in enumerate(zip(own, program, strict=True)):
        if not isinstance(left, Tensor):
            continue
        if left.shape != right.shape or left.dtype != right.dtype:
            return f"output {number} is {right.dtype} {list(right.shape)}, the module's {left.dtype} {list(left.shape)}"
        if not torch.equal(left, right) and not torch.equal(left.nan_to_num(), right.nan_to_num()):
            error = (left.double() - right.double()).abs().max().item()
            return f"output {number} differs by up to {error:.3g}"
    return ""


@contextmanager
def _same_random_numbers(call: Call) -> Iterator[None]:
    """Leave torch's generators as they were, so that the run goes on as if the module had been called once."""
    before = _random_state(call)
    try:
        yield
    finally:
        _set_random_state(call, before)


def _random_state(call: Call) -> list[Tensor]:
    device = call.sample.device
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(call: Call, state: list[Tensor]) -> None:
    # Other threads draw from the same generators: what nobody drew from is left alone.
    now = _random_state(call)
    if not torch.equal(now[0], state[0]):
        torch.set_rng_state(state[0])
    for is_now, on_device in zip(now[1:], state[1:], strict=True):
        if not torch.equal(is_now, on_device):
            torch.cuda.set_rng_state(on_device, call.sample.device)
