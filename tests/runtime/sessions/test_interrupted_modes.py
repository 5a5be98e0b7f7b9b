"""Ctrl-C while a mode is entered or left: struck at every instruction, the module is in no mode afterwards.

A signal is handled between two instructions of Python. Here a tracer raises ``KeyboardInterrupt`` at each of them in
turn, at the first of a function too (where no ``try`` of that function stands), in everything that enters and leaves a
mode: no time is involved, and no point is missed. The exception, and with it every frame and its variables, is kept
while the module is looked at.
"""

from __future__ import annotations

import contextlib
import dis
import gc
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

from fisedit_compiler import Recording, SparseModule, SparsifyConfig, dynamo, module, sparsify
from fisedit_compiler.errors import FiseditError
from fisedit_compiler.runtime.sessions import modes, scopes

SAMPLE = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
MASK = torch.zeros(8, 8, dtype=torch.bool)
MASK[2:5, 3:6] = True
FILES = frozenset({modes.__file__, scopes.__file__, module.__file__, dynamo.__file__, contextlib.__file__, __file__})
"""Where interrupts strike."""

HANDLING = frozenset(dis.opmap[name] for name in ("PUSH_EXC_INFO", "POP_EXCEPT", "RERAISE") if name in dis.opmap)
"""No signal can strike there, and what a tracer raises there leaves Python 3.11 handling an exception for ever."""

Run = Callable[[list[Recording]], None]


class Interrupting:
    """A tracer that counts the instructions of :data:`FILES` and interrupts at some of them."""

    def __init__(self, *points: int) -> None:
        self.points, self.count = frozenset(points), 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in FILES:
            return None
        frame.f_trace_opcodes = True
        if event in {"call", "opcode"} and frame.f_code.co_code[frame.f_lasti] not in HANDLING:
            self.count += 1
            if self.count in self.points:
                raise KeyboardInterrupt
        return self


def interrupted(run: Run, *points: int) -> tuple[int, list[Recording], BaseException | None]:
    """Instructions until the end, what was recorded, and what was raised, with all its frames."""
    made: list[Recording] = []
    tracer = Interrupting(*points)
    error = raised_by(run, made, tracer)
    return tracer.count, made, error


def raised_by(run: Run, made: list[Recording], tracer: Interrupting) -> BaseException | None:
    before = sys.gettrace()
    try:
        sys.settrace(tracer)
        run(made)
        sys.settrace(before)
    except (KeyboardInterrupt, FiseditError) as error:
        sys.settrace(before)
        return error
    return None


@pytest.fixture(autouse=True)
def no_collection() -> Iterator[None]:
    """Nothing is collected by chance while instructions are counted; what goes, goes with its last reference."""
    gc.collect()
    gc.freeze()
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


@pytest.fixture(scope="module")
def compiled() -> SparseModule:
    torch.manual_seed(0)
    module = nn.Conv2d(3, 3, 3, padding=1).eval()
    return sparsify(module, SparsifyConfig(), example_inputs={"input": SAMPLE})


def check(module: Any, made: list[Recording], calls: int, record: Callable[[], Any]) -> None:
    """The module is usable, and recordings are complete only if every call is in them."""
    assert not any(recording.complete and recording.num_calls != calls for recording in made)
    with record() as recording:
        module(SAMPLE)
    assert recording.complete and recording.num_calls == 1


def test_recording(compiled: SparseModule) -> None:
    def run(made: list[Recording]) -> None:
        with compiled.record() as recording:
            made.append(recording)
            compiled(SAMPLE)

    interrupted(run)  # a first run does more
    points, made, error = interrupted(run)
    assert error is None and made[0].complete and points > 200
    for point in range(1, points + 1):
        _, made, error = interrupted(run, point)
        assert isinstance(error, KeyboardInterrupt), point
        assert "in no mode" in repr(compiled), point
        check(compiled, made, 1, compiled.record)


def test_editing(compiled: SparseModule) -> None:
    with compiled.record() as base:
        compiled(SAMPLE)

    def run(made: list[Recording]) -> None:
        with compiled.edit(base, MASK, record=True) as session:
            compiled(SAMPLE)
        assert session.result is not None
        made.append(session.result)

    interrupted(run)  # a first run does more
    points, made, error = interrupted(run)
    assert error is None and made[0].complete and points > 200
    for point in range(1, points + 1):
        _, made, error = interrupted(run, point)
        assert isinstance(error, KeyboardInterrupt), point
        assert "in no mode" in repr(compiled), point
        check(compiled, made, 1, compiled.record)


def test_two_interrupts(compiled: SparseModule) -> None:
    """The second one strikes while the first is dealt with."""

    def run(made: list[Recording]) -> None:
        with compiled.record() as recording:
            made.append(recording)

    points = [interrupted(run)[0] for _ in range(2)][-1]
    for point in range(1, points + 1):
        for next_one in range(point + 1, point + 12):
            _, made, error = interrupted(run, point, next_one)
            assert error is not None and "in no mode" in repr(compiled), (point, next_one)
            assert not any(recording.complete and recording.num_calls for recording in made)
    check(compiled, [], 0, compiled.record)


@contextlib.contextmanager
def managed(compiled: SparseModule) -> Iterator[Recording]:
    with compiled.record() as recording:
        yield recording


@contextlib.contextmanager
def stacked(compiled: SparseModule) -> Iterator[Recording]:
    with contextlib.ExitStack() as stack:
        yield stack.enter_context(compiled.record())


@pytest.mark.parametrize("enter", [managed, stacked])
def test_helpers_of_contextlib(compiled: SparseModule, enter: Callable[[SparseModule], Any]) -> None:
    """They have windows of their own, in which only the traceback holds the mode: it is left with it, or by reset()."""

    def run(made: list[Recording]) -> None:
        with enter(compiled) as recording:
            made.append(recording)
            compiled(SAMPLE)

    points = [interrupted(run)[0] for _ in range(2)][-1]
    held = 0
    for point in range(1, points + 1):
        _, made, error = interrupted(run, point)
        assert isinstance(error, KeyboardInterrupt), point
        if "in no mode" not in repr(compiled):
            held += 1
            if held % 2:
                compiled.reset()
            else:
                error = None
                gc.collect()
        assert "in no mode" in repr(compiled), point
        check(compiled, made, 1, compiled.record)


def test_the_second_door() -> None:
    torch.manual_seed(0)
    original = nn.Conv2d(3, 3, 3, padding=1).eval()
    compiled: Any = torch.compile(original, backend="fisedit")
    with dynamo.record(compiled) as base:
        compiled(SAMPLE)
    assert base.complete

    def run(made: list[Recording]) -> None:
        with dynamo.record(compiled) as recording:
            made.append(recording)

    points = [interrupted(run)[0] for _ in range(2)][-1]
    for point in range(1, points + 1):
        _, made, error = interrupted(run, point)
        assert isinstance(error, KeyboardInterrupt), point
        assert "in no mode" in repr(dynamo.sparse_module(compiled)), point
        assert torch.equal(compiled(SAMPLE), original(SAMPLE))
        check(compiled, made, 0, lambda: dynamo.record(compiled))
