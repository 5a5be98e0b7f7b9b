"""The watch sees every write to what was read, whatever wrote it."""

from __future__ import annotations

import builtins
import sys
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from contextvars import ContextVar
from enum import StrEnum
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fisedit_compiler.capture.keys import ModelState, watch, writes
from fisedit_compiler.capture.keys.structure import read_structure
from fisedit_compiler.capture.keys.watch import Watch


class Part:
    """A plain object with as many attributes as make its dictionary a large one."""

    shared = 1

    def __init__(self) -> None:
        self.a, self.b, self.c, self.d, self.e, self.f, self.g = range(7)


class Other(Part):
    pass


class Grandparent:
    pass


class Parent(Grandparent):
    pass


class OtherParent(Grandparent):
    pass


class Child(Parent):
    pass


class Table(dict[str, Any]):
    """A dictionary with attributes."""


class OtherConv(nn.Conv2d):
    pass


class Named:
    """Says it equals whatever has its name, as a dataclass does with fields that it does not compare."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Named)

    __hash__ = None  # type: ignore[assignment]


class Speed(StrEnum):
    fast = "fast"


class Slotted:
    __slots__ = ("a",)

    def __init__(self) -> None:
        self.a = 1


def rounded(value: float) -> float:
    return round(value)


ROUND = round
FACTOR = 1.0
CHOICE: ContextVar[float] = ContextVar("CHOICE", default=1.0)


def closing_over() -> tuple[Callable[[Tensor], Tensor], Callable[[float], None]]:
    """A function that reads what it closes over, and what writes that."""
    held = 1.0

    def read(sample: Tensor) -> Tensor:
        return sample * held

    def write(value: float) -> None:
        nonlocal held
        held = value

    return read, write


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.part = Part()
        self.scale = 2.0
        self.one, self.speed, self.named, self.nothing = 1, "fast", Named(1.0), 0.0
        self.many: list[Any] = [1, "fast", Named(1.0), 2.0]
        self.few: dict[str, Any] = {"one": 1, "named": Named(1.0)}
        self.ordered = OrderedDict(a=1, b=2)
        self.parts = nn.ModuleDict({"a": nn.ReLU(), "b": nn.GELU()})
        self.slotted = Slotted()
        self.items, self.table, self.names, self.last = [1, 2], {"a": 1}, {"a"}, deque([1, 2])
        self.array, self.text, self.constant = np.ones(3), bytearray(b"ab"), torch.ones(3)
        read, write = closing_over()
        self.read = read
        self.codes: set[Any] = {1}
        self.child, self.owned, self.objects = Child(), Table(a=1), np.array([1, [2]], dtype=object)
        self.bound, self.counted = partial(rounded, 1.0), defaultdict(int, a=1)
        self.behind = Part()
        self.a_weak_reference = weakref.ref(self.behind)  # which is read before the object that it leads to
        self.conv.weight.scale = 1.0  # type: ignore[attr-defined]
        self.numbered: dict[Any, Any] = {1: "a"}
        self.conv.register_forward_pre_hook(lambda *_: None)
        self.conv.register_forward_hook(lambda *_: None)
        self.conv.register_forward_hook(lambda *_: torch.ones(1))
        writers[id(self)] = write

    def forward(self, sample: Tensor) -> Tensor:
        return self.read(self.conv(sample)) * self.scale * self.part.a * FACTOR * CHOICE.get()


writers: dict[int, Callable[[float], None]] = {}


def in_a_hot_loop(model: Model) -> None:
    """The interpreter has specialised the instruction that writes."""
    for number in range(2000):
        model.part.c = number


WRITES: dict[str, Callable[[Model], Any]] = {
    "a module's attribute": lambda model: setattr(model, "scale", 3.0),
    "a module's own dictionary": lambda model: model.__dict__.update(scale=3.0),
    "an attribute of a layer": lambda model: setattr(model.conv, "padding_mode", "circular"),
    "an attribute past the module": lambda model: object.__setattr__(model.conv, "dilation", (2, 2)),
    "a new attribute": lambda model: setattr(model.conv, "forward", lambda sample: sample),
    "a deleted attribute": lambda model: delattr(model, "scale"),
    "an object's attribute": lambda model: setattr(model.part, "d", 30),
    "an object's attribute in a hot loop": in_a_hot_loop,
    "a weight": lambda model: setattr(model.conv, "weight", nn.Parameter(torch.zeros(4, 4, 3, 3))),
    "a weight's memory": lambda model: setattr(model.conv.weight, "data", torch.zeros(4, 4, 3, 3)),
    "a hook": lambda model: model.conv.register_forward_hook(lambda *_: None),
    "the table of hooks": lambda model: setattr(model.conv, "_forward_hooks", {0: lambda *_: None}),
    "a table of buffers filled at once": lambda model: model._buffers.update({"mean": torch.zeros(4)}),
    "hooks filled at once": lambda model: model._forward_hooks.update({0: lambda *_: None}),
    "a hook taken out": lambda model: model.conv._forward_pre_hooks.clear(),
    "a weight past the module": lambda model: model.conv._parameters.update(bias=nn.Parameter(torch.zeros(4))),
    "a method of the class": lambda model: setattr(Part, "extra", lambda self: 1),
    "a class attribute that was there": lambda model: setattr(Part, "shared", 2),
    "a submodule": lambda model: setattr(model, "conv", nn.Conv2d(4, 4, 1)),
    "the class": lambda model: setattr(Part, "extra", 1),
    "what a function closes over": lambda model: writers[id(model)](2.0),
    "defaults of a function": lambda model: setattr(model.read, "__defaults__", (torch.ones(1),)),
    "code of a function": lambda model: setattr(model.read, "__code__", other_code()),
    "a slot": lambda model: setattr(model.slotted, "a", 2),
    "an element of a list": lambda model: model.items.__setitem__(0, 3),
    "a list that grows": lambda model: model.items.append(3),
    "a value of a dictionary": lambda model: model.table.update(a=2),
    "a set": lambda model: model.names.add("b"),
    "a deque": lambda model: model.last.rotate(),
    "an element of an array": lambda model: model.array.__setitem__(0, 3),
    "a byte": lambda model: model.text.__setitem__(0, 1),
    "an element of a plain tensor": lambda model: model.constant.__setitem__(0, 3),
    "a global": lambda model: globals().update(FACTOR=2.0),
    "an object's class": lambda model: setattr(model.part, "__class__", Other),
    "a module's class": lambda model: setattr(model.conv, "__class__", OtherConv),
    "an equal number of another type": lambda model: setattr(model, "one", 1.0),
    "a flag for a number": lambda model: setattr(model, "one", True),
    "zero's sign": lambda model: setattr(model, "nothing", -0.0),
    "an equal text of another type": lambda model: setattr(model, "speed", Speed.fast),
    "an equal object": lambda model: setattr(model, "named", Named(2.0)),
    "an equal number in a list": lambda model: model.many.__setitem__(0, 1.0),
    "an equal object in a list": lambda model: model.many.__setitem__(2, Named(2.0)),
    "an equal object in a dictionary": lambda model: model.few.update(named=Named(2.0)),
    "an equal number in a set": lambda model: (model.codes.remove(1), model.codes.add(1.0)),
    "an equal key of another type": lambda model: model.numbered.update({1.0: model.numbered.pop(1)}),
    "the order of a dictionary": lambda model: model.few.update(one=model.few.pop("one")),
    "the order of an ordered dictionary": lambda model: model.ordered.move_to_end("a"),
    "the order of parts": lambda model: model.parts.update({"a": model.parts.pop("a")}),
    "the order of hooks": lambda model: model.conv._forward_hooks.move_to_end(min(model.conv._forward_hooks)),
    "all attributes of an object": lambda model: setattr(model.part, "__dict__", {**vars(model.part), "a": 30}),
    "equal attributes, and then one": lambda model: (
        setattr(model.part, "__dict__", {**vars(model.part)}),
        setattr(model.part, "a", 30),
    ),
    "all attributes of a module": lambda model: setattr(
        model.conv, "__dict__", {**vars(model.conv), "dilation": (2, 2)}
    ),
    "all attributes of a dictionary": lambda model: setattr(model.owned, "__dict__", {"scale": 2.0}),
    "all attributes of a function": lambda model: setattr(model.read, "__dict__", {"scale": 2.0}),
    "all attributes of a weight": lambda model: setattr(model.conv.weight, "__dict__", {"scale": 2.0}),
    "all attributes behind a weak reference": lambda model: setattr(model.behind, "__dict__", {"a": 30}),
    "the class behind a weak reference": lambda model: setattr(model.behind, "__class__", Other),
    "what a class inherits from": lambda model: setattr(Child, "__bases__", (OtherParent,)),
    "an object in an array": lambda model: model.objects.__setitem__(0, 3),
    "what is in an object in an array": lambda model: model.objects[1].append(3),
    "what a partial function calls": lambda model: model.bound.__setstate__((float, (1.0,), {}, {})),
    "an attribute of a partial function": lambda model: setattr(model.bound, "scale", 2.0),
    "what a dictionary makes of a missing key": lambda model: setattr(model.counted, "default_factory", float),
    "a builtin function": lambda model: setattr(builtins, "round", rounded),
    "a context variable": lambda model: CHOICE.set(2.0),
}


def other_code() -> Any:
    held = 1.0

    def other(sample: Tensor) -> Tensor:
        return sample - held

    return other.__code__


@pytest.fixture(params=["by clock", "by versions", "by comparison"])
def _with_shortcuts_or_without(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    assert watch.dict_version is not None, "torch has no versions of dictionaries any more: a look costs twice as much"
    if request.param == "by clock":
        if sys.version_info < (3, 12):
            pytest.skip("Python 3.11 counts the writes of each dictionary apart")
        assert writes.clock() is not None, "writes are not numbered in one row any more: a look costs twice as much"
        return
    monkeypatch.setattr(watch, "clock", lambda: None)
    if request.param == "by comparison":
        monkeypatch.setattr(watch, "dict_version", None)


@pytest.mark.usefixtures("_with_shortcuts_or_without")
@pytest.mark.parametrize("write", WRITES)
def test_every_write_is_seen(write: str) -> None:
    model = Model()
    state = ModelState(model)
    before = state.read()
    assert state.glance() is before, "nothing changed"
    try:
        WRITES[write](model)
        assert state.glance() != before
    finally:
        Part.shared = 1
        Child.__bases__ = (Parent,)
        builtins.round = ROUND
        globals().update(FACTOR=1.0)
        CHOICE.set(1.0)
        if hasattr(Part, "extra"):
            del Part.extra


@pytest.mark.usefixtures("_with_shortcuts_or_without")
def test_writing_what_was_there_is_no_change() -> None:
    model = Model()
    looked = read_structure(model).watch
    for _ in range(3):
        model.scale, model.part.c, model.many[3], model.few["one"] = float("2"), 2, float("2"), 1
        model.conv.stride = (1, 1)
        assert not looked.changed()
    model.part.c = 3
    assert looked.changed() and looked.changed(), "and it is seen again until it is read"


def test_a_tensor_without_version_or_memory_is_watched() -> None:
    with torch.inference_mode():
        value = torch.zeros(3)
    looked = Watch()
    looked.tensor(value)
    assert not looked.changed()


def test_a_wrapper_is_asked_for_its_parts_every_time() -> None:
    """What a quantized tensor is made of may be exchanged inside it."""
    from torch.testing._internal.two_tensor import TwoTensor

    model = nn.Module()
    model.weight = nn.Parameter(TwoTensor(torch.zeros(4), torch.ones(4)))
    state = ModelState(model)
    before = state.read()
    model.weight.b = torch.full((4,), 2.0)
    assert state.read() != before
