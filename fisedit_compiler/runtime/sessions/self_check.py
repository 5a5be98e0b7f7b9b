"""Whether a program computes what its module computes: found out at the first recorded call of every program.

The key of a program says what was captured; this check does not trust it. The module itself is called with the same
arguments, and its outputs are compared bit for bit. A difference means another capture, a second one an error.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fisedit_compiler.capture.keys.notes import describe
from fisedit_compiler.capture.keys.snapshot import Snapshot
from fisedit_compiler.compiling import one_at_a_time
from fisedit_compiler.errors import CaptureError
from fisedit_compiler.runtime.calls.call import Call
from fisedit_compiler.runtime.calls.programs import ProgramStore
from fisedit_compiler.runtime.execution.executable import Executable
from fisedit_compiler.runtime.sessions.left_behind import dependence

logger = logging.getLogger(__name__)

Recorded = tuple[list[Any], dict[str, Tensor]]


@one_at_a_time  # an export in another thread turns oneDNN off for the whole process: last bits would differ
def record_checked(programs: ProgramStore, call: Call, *, maps: bool) -> tuple[Executable, Recorded]:
    """Record a call and compare it with the module's own, which runs beside it.

    Args:
        programs: of the module; learns which attributes its forward writes, and captures again where need be.
        call: the first one of its program.
        maps: also record cross-attention maps.

    Raises:
        CaptureError: the module computes something else than any capture of it, or something else at every call.
    """
    executable = call.executable
    own = _own_outputs(programs, call)
    problem = ""
    for attempt in ("first", "second"):
        with _same_random_numbers(call):
            recorded = executable.record(call.tensors, maps=maps)
        problem = _difference(own, recorded[0])
        if not problem:
            executable.checked = True
            return executable, recorded
        if attempt == "first":
            logger.warning("a program does not compute what its module computes (%s): captured again", problem)
            executable = programs.capture_again(call)
    name = type(programs.module).__name__
    itself = _difference(own, _run(call))
    if itself:
        raise CaptureError(
            f"{name} computes something else at every call with the same arguments and random state ({itself}). A "
            "recording could not be repeated, nor what is outside a mask be kept. Make its operations deterministic "
            "(torch.use_deterministic_algorithms(True) names those that are not), or sparsify a submodule without them."
        )
    raise CaptureError(
        f"{name} computes something else than its captured graph ({problem}), also when captured again. Its forward "
        "reads something that a graph cannot hold: a hook that changes results, a global or file that is read at every "
        "call, random numbers of another library. Take that out of the forward, or sparsify the submodule without it."
    )


def _own_outputs(programs: ProgramStore, call: Call) -> list[Any]:
    """The module's outputs; what its forward writes is told to ``programs`` if it does not depend on it."""
    start = Snapshot(programs.module)
    own = _run(call)
    written = start.written()
    if not written:
        return own
    end = Snapshot(programs.module)
    try:
        problem = dependence(start, own, lambda: _run(call), lambda: _run_on_others(programs, call), _difference)
    finally:
        end.restore(everything=True)  # as if the module had been called once
    if problem:
        places = ", ".join(sorted(set(map(describe, written))))
        raise CaptureError(
            f"{type(programs.module).__name__} may compute something else at every call ({problem}), since its forward "
            f"writes to what it reads: {places}. A recording could not be repeated. Make the forward independent of "
            "what an earlier call left there (the timestep tells which step it is), or pass it as an argument."
        )
    programs.leave_out(written)
    return own


def _run(call: Call) -> list[Any]:
    with _same_random_numbers(call):
        return _owned(call.run_original())


def _run_on_others(programs: ProgramStore, call: Call) -> None:
    """Call the module with other latents and texts of the same shapes."""
    others = pytree.tree_map_only(Tensor, _other, call.arguments())
    with _same_random_numbers(call):
        call.ambient.around(programs.module)(**others)


def _other(value: Tensor) -> Tensor:
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
    device = call.sample.device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, enabled=True):
        yield
