"""What a forward writes is told place by place, left out of the key, and put back after a capture."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fisedit_compiler.capture.keys.model import ModelState
from fisedit_compiler.capture.keys.notes import describe
from fisedit_compiler.capture.keys.snapshot import Snapshot

SEEN: dict[str, Any] = {"scale": 2.0}
COUNT = 0


class Tally:
    __slots__ = ("calls", "kept")

    def __init__(self) -> None:
        self.calls, self.kept = 0, 1.0


class Net(nn.Module):
    """Reads something at every place that it writes to."""

    total: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.count, self.scale = 0, 2.0
        self.history: list[Any] = [2.0]
        self.state = [0, 2.0]
        self.info: dict[str, Any] = {"size": None, "ratio": 0.5}
        self.tags = {"a"}
        self.recent: deque[int] = deque([7, 1], maxlen=2)
        self.tally = Tally()
        self.log = np.zeros(2)
        self.bytes = array("d", [0.0])
        self.sums = torch.zeros(2)
        cell = 0

        def closing() -> None:
            nonlocal cell
            cell += 1

        self.closing = closing

    def forward(self, sample: Tensor) -> Tensor:
        return sample


def in_a_global(net: Net) -> None:
    global COUNT
    COUNT += 1


def reads_globals(self: Net, sample: Tensor) -> Tensor:
    return sample * SEEN["scale"] + COUNT


WRITES: dict[str, tuple[str, Callable[[Net], Any], Callable[[Net], Any]]] = {
    # What is written, and what beside it stays watched.
    "attribute": ("count", lambda net: setattr(net, "count", net.count + 1), lambda net: setattr(net, "scale", 3.0)),
    "new attribute": ("size", lambda net: setattr(net, "size", object()), lambda net: setattr(net, "scale", 3.0)),
    "list that grows": ("history", lambda net: net.history.append(object()), lambda net: net.history.insert(0, 3.0)),
    "element": ("state[0]", lambda net: net.state.__setitem__(0, object()), lambda net: net.state.__setitem__(1, 3.0)),
    "key": ("info.size", lambda net: net.info.update(size=object()), lambda net: net.info.update(ratio=0.75)),
    "new key": ("info", lambda net: net.info.update({str(len(net.info)): 1}), lambda net: net.info.update(ratio=0.75)),
    "set": ("tags", lambda net: net.tags.add(str(len(net.tags))), lambda net: net.tags.remove("a")),
    "full deque": (
        "recent[0]",
        lambda net: net.recent.append(object()),
        lambda net: setattr(net, "recent", deque([7, 1], maxlen=3)),
    ),
    "slot": (
        "tally.calls",
        lambda net: setattr(net.tally, "calls", object()),
        lambda net: setattr(net.tally, "kept", 2),
    ),
    "array": ("log", lambda net: net.log.__iadd__(1), lambda net: setattr(net, "log", np.ones(3))),
    "array of Python's": (
        "bytes",
        lambda net: net.bytes.__setitem__(0, net.bytes[0] + 1),
        lambda net: delattr(net, "bytes"),
    ),
    "tensor": ("sums", lambda net: net.sums.add_(1), lambda net: setattr(net, "sums", torch.ones(3))),
    "class attribute": (
        f"of {Net.__qualname__}.total",
        lambda net: setattr(Net, "total", Net.total + 1),
        lambda net: setattr(Net, "other", 1),
    ),
    "global dictionary": (
        f"{__name__}.SEEN",
        lambda net: SEEN.update({str(len(SEEN)): 1}),
        lambda net: SEEN.update(scale=3.0),
    ),
    "global number": (f"{__name__}.COUNT", in_a_global, lambda net: SEEN.update(scale=3.0)),
}


@pytest.fixture(autouse=True)
def _globals_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "SEEN", {"scale": 2.0})
    monkeypatch.setattr(Net, "total", 0)
    monkeypatch.setattr(Net, "forward", reads_globals)
    monkeypatch.setattr(Net, "other", 0, raising=False)


@pytest.mark.parametrize("case", WRITES)
def test_only_what_was_written_is_left_out(case: str) -> None:
    place, write, change = WRITES[case]
    net = Net()
    state, before = ModelState(net), Snapshot(net)
    first = state.read()
    write(net)
    assert state.glance() != first
    notes = before.written()
    assert any(describe(note).endswith(place) for note in notes), [describe(note) for note in notes]
    state.leave_out(notes)
    key = state.read()
    for _ in range(2):
        write(net)
        assert state.glance() == key
    change(net)
    assert state.read().structure != key.structure


def test_what_a_closure_counts_is_told() -> None:
    net = Net()
    before = Snapshot(net)
    net.closing()
    (note,) = before.written()
    state = ModelState(net)
    state.leave_out(frozenset([note]))
    key = state.read()
    net.closing()
    assert state.glance() == key


@pytest.mark.parametrize(
    "case", sorted(WRITES.keys() - {"array", "tensor", "global number", "global dictionary", "class attribute", "slot"})
)
def test_what_is_on_the_module_is_put_back(case: str) -> None:
    net = Net()
    state, before = ModelState(net), Snapshot(net)
    key = state.read()
    WRITES[case][1](net)
    before.restore()
    assert not before.written()
    assert state.read() == key


def test_what_a_capture_left_elsewhere_is_taken_away_and_nothing_else() -> None:
    """Others may have written there meanwhile."""
    net, size = Net(), ShapeEnv().create_unbacked_symint()
    before = Snapshot(net)
    SEEN["size"] = SEEN["another thread's"] = (1, 2)
    SEEN["size"] = (1, size)
    net.tally.calls, net.tally.kept = size, 5.0
    Net.total = size
    before.restore()
    assert SEEN == {"scale": 2.0, "another thread's": (1, 2)}
    assert (net.tally.calls, net.tally.kept, Net.total) == (0, 5.0, 0)


def test_reading_a_size_of_a_capture_is_no_error() -> None:
    net = Net()
    net.tally.kept = ShapeEnv().create_unbacked_symint()
    assert ModelState(net).read() == ModelState(net).read()


def test_the_order_in_which_things_were_used_last_is_a_note() -> None:
    net = Net()
    net.info = {"a": 1, "b": 2, "c": 3}
    before = Snapshot(net)
    net.info["a"] = net.info.pop("a")
    notes = before.written()
    assert [describe(note) for note in notes] == ["info"]
    state = ModelState(net)
    state.leave_out(notes)
    key = state.read()
    net.info["b"] = net.info.pop("b")
    assert state.read() == key
    before.restore(everything=True)
    assert list(net.info) == ["a", "b", "c"] and not before.written()
    net.info["b"] = 5
    assert state.read() != key
