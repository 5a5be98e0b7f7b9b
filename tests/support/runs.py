"""Runs that are made call by call, so that a test can say whose call is next: in threads, in tasks, or one by one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fisedit_compiler import Recording, SparseModule
from tests.support.zoo import Inputs

Run = Callable[[list[Tensor]], Iterator[None]]
"""Makes a run and puts what it computes into the list; stops between two calls."""

CALLS = 2
"""Calls of each run."""
WAIT = 120
"""Seconds after which a test that waits for nobody fails."""


def alone(runs: Sequence[Run]) -> list[list[Tensor]]:
    """What each run computes when none is made beside it."""
    results: list[list[Tensor]] = [[] for _ in runs]
    for run, computed in zip(runs, results, strict=True):
        for _ in run(computed):
            pass
    return results


def stops(run: Run) -> int:
    """How often a run stops, its end included."""
    return sum(1 for _ in run([])) + 1


def in_threads(runs: Sequence[Run], turns: Sequence[int] | None = None) -> list[list[Tensor]]:
    """What each run computes in a thread of its own; ``turns`` says whose turn is next, else all go at once."""
    results: list[list[Tensor]] = [[] for _ in runs]
    ready, baton = threading.Barrier(len(runs), timeout=WAIT), _Baton(turns)

    def make(number: int) -> None:
        ready.wait()
        made = runs[number](results[number])
        while baton.turn(number, lambda: next(made, made)) is not made:
            pass

    together([lambda number=number: make(number) for number in range(len(runs))])
    return results


def in_tasks(runs: Sequence[Run], turns: Sequence[int]) -> list[list[Tensor]]:
    """What each run computes in an asyncio task of its own, all of one thread."""
    results: list[list[Tensor]] = [[] for _ in runs]
    left = list(turns)

    async def make(number: int) -> None:
        made = runs[number](results[number])
        going = True
        while going:
            while left[0] != number:
                await asyncio.sleep(0)
            going = next(made, made) is not made
            left.pop(0)

    async def all_of_them() -> None:
        await asyncio.gather(*(make(number) for number in range(len(runs))))

    asyncio.run(all_of_them())
    return results


class _Baton:
    def __init__(self, turns: Sequence[int] | None) -> None:
        self._turns = None if turns is None else list(turns)
        self._passed = threading.Condition()

    def turn(self, number: int, step: Callable[[], Any]) -> Any:
        """Make a step when it is this run's turn."""
        if self._turns is None:
            return step()
        with self._passed:
            mine = self._passed.wait_for(lambda: not self._turns or self._turns[0] == number, WAIT)
            assert mine, "nobody passed the baton on"
            try:
                return step()
            except BaseException:
                self._turns.clear()  # let the others end
                raise
            finally:
                del self._turns[:1]
                self._passed.notify_all()


def together(functions: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each function returns, each in a thread of its own, all started at once; what one raises is raised."""
    ready = threading.Barrier(len(functions), timeout=WAIT)
    results: list[Any] = [None] * len(functions)
    raised: list[BaseException] = []

    def run(number: int) -> None:
        ready.wait()
        try:
            results[number] = functions[number]()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    if raised:
        raise raised[0]
    assert not any(thread.is_alive() for thread in threads), "they wait for each other"
    return results


# -- runs of a compiled UNet -----------------------------------------------------------------------------


def calls_of(inputs: Inputs) -> Iterator[Inputs]:
    for number in range(CALLS):
        yield {**inputs, "timestep": torch.tensor(900 - 300 * number)}


def slots_of(recording: Recording | None) -> list[Tensor]:
    assert recording is not None and recording.complete
    return [call.slots[name].clone() for call in recording for name in call.slots]


def recorded(compiled: SparseModule, inputs: Inputs) -> Recording:
    with compiled.record() as recording:
        for call in calls_of(inputs):
            compiled(**call)
    return recording


def record(compiled: SparseModule, inputs: Inputs, maps: int = 0) -> Run:
    def run(computed: list[Tensor]) -> Iterator[None]:
        with compiled.record(maps) as recording:
            for call in calls_of(inputs):
                computed.append(compiled(**call)[0])
                yield
        computed += slots_of(recording)

    return run


def edit(
    compiled: SparseModule, base: Recording, inputs: Inputs, mask: Any, *, late: bool = False, **options: Any
) -> Run:
    """An edit; with ``late`` its mask is set after the first call, which runs densely."""

    def run(computed: list[Tensor]) -> Iterator[None]:
        with compiled.edit(base, None if late else mask, **options) as session:
            for call in calls_of(inputs):
                computed.append(compiled(**call)[0])
                yield
                if late:
                    session.set_mask(mask)
        for result in session.results:
            computed += slots_of(result)

    return run


def dense(compiled: SparseModule, inputs: Inputs) -> Run:
    def run(computed: list[Tensor]) -> Iterator[None]:
        for call in calls_of(inputs):
            computed.append(compiled(**call)[0])
            yield

    return run


def check(found: list[list[Tensor]], expected: list[list[Tensor]]) -> None:
    for number, (now, then) in enumerate(zip(found, expected, strict=True)):
        assert len(now) == len(then), f"run {number}"
        assert all(map(torch.equal, now, then)), f"run {number} computes something else than alone"
