"""Forwards that leave something behind: those that go by it at a later call, and those that only leave it there.

Every forward of ``REFUSED`` computes for its first calls what its first call computes.
"""

from __future__ import annotations

import itertools
import random
import weakref
from array import array
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SAMPLE = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
MASK = torch.zeros(8, 8, dtype=torch.bool)
MASK[2:5, 3:6] = True
LATE = 9
CHOICE: ContextVar[int] = ContextVar("CHOICE", default=0)
REGISTRY: dict[str, Any] = {}
COUNT = 0


class Controller:
    """As the controllers of prompt-to-prompt and its relatives."""

    calls = 0

    def __init__(self) -> None:
        self.step, self.settings = 0, {"step": 0, "scale": 1.0}


@dataclass(frozen=True)
class Frozen:
    step: int = 0
    scale: float = 2.0


class Slotted:
    __slots__ = ("step",)

    def __init__(self) -> None:
        self.step = 0


def closing_over() -> Callable[[], int]:
    step = 0

    def count() -> int:
        nonlocal step
        step += 1
        return step

    return count


def numbers() -> Any:
    number = 0
    while True:
        yield number
        number += 1


class Net(nn.Module):
    """A convolution whose output a forward may double."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.step, self.name, self.pair, self.first = 0, "", (0, 0), True
        self.kept: Any = None
        self.size: Any = None
        self.steps = [0]
        self.history: list[Any] = []
        self.store: dict[Any, Any] = {}
        self.seen: set[Any] = set()
        self.recent: deque[Any] = deque(maxlen=3)
        self.array, self.bytes = np.zeros(2), array("d", [0.0])
        self.schedule, self.scales = deque([1.0] * LATE + [2.0] * 3), [2.0] * 3 + [1.0] * (LATE + 1)
        self.frozen, self.by_part = Frozen(), weakref.WeakKeyDictionary[nn.Module, float]()
        self.controller, self.slotted, self.count = Controller(), Slotted(), closing_over()
        self.iterator, self.counter, self.generator = iter(range(99)), itertools.count(), numbers()
        self.zipped = zip(itertools.count(), itertools.repeat(1), strict=False)
        self.random, self.legacy, self.modern = random.Random(0), np.random.RandomState(0), np.random.default_rng(0)

    def late(self, sample: Tensor, yes: Any) -> Tensor:
        return self.conv(sample) * 2 if yes else self.conv(sample)


def _counts(self: Net, sample: Tensor) -> Tensor:
    self.step += 1
    return self.late(sample, self.step > LATE)


def _chooses_steps(self: Net, sample: Tensor) -> Tensor:  # as MasaCtrl does
    self.step += 1
    return self.late(sample, self.step in [12, 13])


def _every_so_often(self: Net, sample: Tensor) -> Tensor:
    self.step += 1
    return self.late(sample, self.step % LATE == 0)


def _looks_up_a_scale(self: Net, sample: Tensor) -> Tensor:
    scale = ([1.0] * LATE + [2.0] * 90)[self.step]
    self.step += 1
    return self.conv(sample) * scale


def _looks_up_a_key(self: Net, sample: Tensor) -> Tensor:
    self.step += 1
    return self.conv(sample) * {12: 2.0}.get(self.step, 1.0)


def _ramps(self: Net, sample: Tensor) -> Tensor:
    self.step += 1
    return self.conv(sample) * max(self.step - LATE, 1)


def _counts_on_an_object(self: Net, sample: Tensor) -> Tensor:
    self.controller.step += 1
    return self.late(sample, self.controller.step > LATE)


def _counts_in_a_dictionary(self: Net, sample: Tensor) -> Tensor:
    self.controller.settings["step"] += 1
    return self.late(sample, self.controller.settings["step"] > LATE)


def _counts_on_a_class(self: Net, sample: Tensor) -> Tensor:
    Controller.calls += 1
    return self.late(sample, Controller.calls > LATE)


def _counts_in_a_slot(self: Net, sample: Tensor) -> Tensor:
    self.slotted.step += 1
    return self.late(sample, self.slotted.step > LATE)


def _counts_in_a_closure(self: Net, sample: Tensor) -> Tensor:
    return self.late(sample, self.count() > LATE)


def _counts_in_a_global(self: Net, sample: Tensor) -> Tensor:
    global COUNT
    COUNT += 1
    return self.late(sample, COUNT > LATE)


def _counts_in_a_list(self: Net, sample: Tensor) -> Tensor:
    self.steps[0] += 1
    return self.late(sample, self.steps[0] > LATE)


def _counts_in_a_tuple(self: Net, sample: Tensor) -> Tensor:
    self.pair = (self.pair[0] + 1, 0)
    return self.late(sample, self.pair[0] > LATE)


def _counts_in_a_text(self: Net, sample: Tensor) -> Tensor:
    self.name += "x"
    return self.late(sample, len(self.name) > LATE)


def _counts_in_an_array(self: Net, sample: Tensor) -> Tensor:
    self.array[0] += 1
    return self.late(sample, self.array[0] > LATE)


def _counts_in_python_s_array(self: Net, sample: Tensor) -> Tensor:
    self.bytes[0] += 1
    return self.late(sample, self.bytes[0] > LATE)


def _counts_in_a_context_variable(self: Net, sample: Tensor) -> Tensor:
    CHOICE.set(CHOICE.get() + 1)
    return self.late(sample, CHOICE.get() > LATE)


def _goes_by_the_length_of_a_list(self: Net, sample: Tensor) -> Tensor:
    self.history.append(1)
    return self.late(sample, len(self.history) > LATE)


def _goes_by_the_length_of_a_dictionary(self: Net, sample: Tensor) -> Tensor:
    self.store[len(self.store)] = 1
    return self.late(sample, len(self.store) > LATE)


def _goes_by_the_length_of_a_set(self: Net, sample: Tensor) -> Tensor:
    self.seen.add(max(self.seen, default=0) + 1)
    return self.late(sample, len(self.seen) > LATE)


def _takes_from_a_list(self: Net, sample: Tensor) -> Tensor:
    self.history = self.history or list(range(99))
    return self.late(sample, self.history.pop(0) > LATE)


def _keeps_what_it_computed_first(self: Net, sample: Tensor) -> Tensor:  # as caches of keys and values do
    if self.kept is None:
        self.kept = self.conv(sample)
    return self.conv(sample) + self.kept


def _keeps_it_in_a_global(self: Net, sample: Tensor) -> Tensor:
    if "kept" not in REGISTRY:
        REGISTRY["kept"] = self.conv(sample)
    return self.conv(sample) + REGISTRY["kept"]


def _adds_the_last_output(self: Net, sample: Tensor) -> Tensor:
    output = self.conv(sample)
    output, self.kept = output if self.kept is None else output + self.kept, output
    return output


def _looks_up_a_text(self: Net, sample: Tensor) -> Tensor:
    self.step += 1
    return self.conv(sample) * {"step_12": 2.0}.get(f"step_{self.step}", 1.0)


def _turns_a_deque(self: Net, sample: Tensor) -> Tensor:
    self.schedule.rotate()
    return self.conv(sample) * self.schedule[0]


def _pops_from_a_list(self: Net, sample: Tensor) -> Tensor:
    return self.conv(sample) * self.scales.pop()


def _keeps_a_state_that_is_replaced(self: Net, sample: Tensor) -> Tensor:
    self.frozen = replace(self.frozen, step=self.frozen.step + 1)
    return self.late(sample, self.frozen.step > LATE)


def _draws(name: str) -> Callable[[Net, Tensor], Tensor]:
    def forward(self: Net, sample: Tensor) -> Tensor:
        drawn = next(getattr(self, name))
        return self.late(sample, (drawn[0] if isinstance(drawn, tuple) else drawn) > LATE)

    return forward


def _throws_dice(name: str) -> Callable[[Net, Tensor], Tensor]:
    return lambda self, sample: self.late(sample, getattr(self, name).random() > 0.99)


def _throws_old_dice(self: Net, sample: Tensor) -> Tensor:
    return self.late(sample, self.legacy.random_sample() > 0.99)


REFUSED: dict[str, Callable[[Net, Tensor], Tensor]] = {
    name.strip("_"): forward
    for name, forward in list(globals().items())
    if name.startswith("_") and getattr(forward, "__annotations__", {}).get("sample") == "Tensor"
}
REFUSED.update({f"draws from {name}": _draws(name) for name in ("iterator", "counter", "generator", "zipped")})
REFUSED.update({f"throws {name} dice": _throws_dice(name) for name in ("random", "modern")})


def notes_a_size(self: Net, sample: Tensor) -> Tensor:
    self.size = sample.shape
    return self.conv(sample)


def counts(self: Net, sample: Tensor) -> Tensor:
    self.step += 1
    self.controller.step += 1
    self.controller.settings["step"] += 1
    self.slotted.step -= 1
    Controller.calls = 1 + Controller.calls
    self.steps[0] = self.steps[0] + 1
    self.array[0] += 1
    self.count()
    return self.conv(sample) * self.controller.settings["scale"]


def logs(self: Net, sample: Tensor) -> Tensor:
    self.step += 1
    self.name = f"call {self.step}, {self.step!s}, {self.step!r}"
    return self.conv(sample)


def collects(self: Net, sample: Tensor) -> Tensor:
    output = self.conv(sample)
    self.history.append(output.detach())
    self.recent.append(output)
    self.seen.add(f"call {self.step}")
    self.store[f"map {self.step}"] = output
    self.step += 1
    self.kept = output
    return output


def logs_now_and_then(self: Net, sample: Tensor) -> Tensor:
    self.step += 1
    if self.step % 10 == 0:
        self.history.append(self.step)
    return self.conv(sample)


def stores_attention(self: Net, sample: Tensor) -> Tensor:
    """As the AttentionStore of prompt-to-prompt: sums per step, which it hands out when asked."""
    output = self.conv(sample)
    if self.step % 2 == 0:
        self.kept = {"down": [], "up": []}
    self.kept["down" if self.step % 2 else "up"].append(output.detach())
    self.step += 1
    if self.step % 2 == 0:
        if not self.store:
            self.store = self.kept
        else:
            for key in self.store:
                for index in range(len(self.store[key])):
                    self.store[key][index] = self.store[key][index] + self.kept[key][index]
    return output


def fills_a_ring(self: Net, sample: Tensor) -> Tensor:
    output = self.conv(sample)
    if self.size is None:
        self.size, self.kept = 4, torch.zeros(4)
    if not torch.compiler.is_compiling():
        self.kept[self.step % self.size] = output.mean()
    self.step += 1
    return output


def replaces_its_state(self: Net, sample: Tensor) -> Tensor:
    self.frozen = replace(self.frozen, step=self.frozen.step + 1)
    return self.conv(sample) * self.frozen.scale


def keeps_by_its_parts(self: Net, sample: Tensor) -> Tensor:
    if self.conv not in self.by_part:
        self.by_part[self.conv] = 2.0
    return self.conv(sample) * self.by_part[self.conv]


def knows_its_first_call(self: Net, sample: Tensor) -> Tensor:
    if self.first:
        self.first, self.size = False, "seen"
    return self.conv(sample)


def says_where_it_is(self: Net, sample: Tensor) -> Tensor:
    token = CHOICE.set(1)
    output = self.conv(sample)
    CHOICE.reset(token)
    return output


def leaves_things_alone(self: Net, sample: Tensor) -> Tensor:
    return self.conv(sample) * (1 if self.iterator and self.random and self.history is not None else 2)


RIGHT = (
    notes_a_size, counts, logs, collects, logs_now_and_then, stores_attention, fills_a_ring, replaces_its_state,
    keeps_by_its_parts, knows_its_first_call, says_where_it_is, leaves_things_alone,
)  # fmt: skip
