"""The key notices what a forward reads by detours: wrappers, names that are computed or missing, members, classes."""

from __future__ import annotations

import functools
import gc
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from fisedit_compiler.capture.keys.model import ModelState
from fisedit_compiler.capture.keys.reader import Reader
from fisedit_compiler.capture.keys.structure import read_structure, structure_key

DEFAULT = 2.0


class Made:
    """An object of the user's that a forward makes."""

    def __init__(self) -> None:
        self.scale = DEFAULT


class MadeByNew:
    def __new__(cls) -> MadeByNew:
        made = super().__new__(cls)
        made.scale = DEFAULT  # type: ignore[attr-defined]
        return made


@dataclass
class Settings:
    scale: float = 2.0
    made: Made = field(default_factory=Made)


class Kind(Enum):
    soft = "soft"
    hard = "hard"

    def __init__(self, name: str) -> None:
        self.scale, self.sizes = 2.0, [1.0]


class Pair(NamedTuple):
    left: float
    right: float

    @property
    def total(self) -> float:
        return self.left + self.right


class Slotless:
    __slots__ = ()

    def scale(self) -> float:
        return 2.0


class Factor(float):
    __slots__ = ()

    def scaled(self) -> float:
        return self * 2


class Held:
    def __init__(self) -> None:
        self.scale = 2.0


class Small(nn.Module):
    known: ClassVar[dict[str, float]] = {}

    def __init__(self, value: Any = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)
        self.value = value

    def forward(self, sample: Tensor) -> Tensor:
        return self.conv(sample)


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Any:
    made: Any = types.ModuleType("settings_of_a_user")
    made.SCALE_A, made.parts = 2.0, types.ModuleType("settings_of_a_user.parts")
    made.parts.SCALE_B = 2.0
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made


def with_forward(source: str, **names: Any) -> Small:
    space = {"torch": torch, "__name__": "settings_of_a_user", **names}
    space["__space__"] = space
    exec(f"def forward(sample):\n    {source}", space)
    module = Small()
    module.forward = space["forward"]
    return module


def space_of(module: Any) -> dict[str, Any]:
    return vars(module)["forward"].__globals__  # type: ignore[no-any-return]


def check_noticed(module: nn.Module, change: Callable[[pytest.MonkeyPatch], Any]) -> None:
    state = ModelState(module)
    before = state.read()
    assert state.glance() is before
    with pytest.MonkeyPatch.context() as patch:
        change(patch)
        assert state.glance().structure != before.structure
    assert state.glance().structure == before.structure


def wrapped(function: Any) -> Any:
    """As somebody wraps a function of a library to change what it computes."""

    @functools.wraps(function)
    def around(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) * DEFAULT

    return around


@pytest.mark.parametrize(
    ("owner", "name"),
    [(F, "silu"), (torch, "bmm"), (nn.Conv2d, "forward"), (torch.special, "expm1"), (torch.linalg, "norm"),
     (torch.fft, "fftn"), (F, "max_pool2d")],
)  # fmt: skip
def test_a_wrapper_that_calls_itself_what_it_wraps(owner: Any, name: str) -> None:
    check_noticed(Small(), lambda patch: patch.setattr(owner, name, wrapped(getattr(owner, name))))
    check_noticed(Small(), lambda patch: patch.setattr(owner, name, functools.lru_cache(wrapped(getattr(owner, name)))))


def test_a_wrapper_around_a_forward_is_read() -> None:
    module = Small()
    module.conv.forward = wrapped(module.conv.forward)  # type: ignore[method-assign]
    check_noticed(module, lambda patch: patch.setitem(globals(), "DEFAULT", 3.0))


@pytest.mark.parametrize(
    ("name", "value"),
    [("doubled", functools.partialmethod(lambda self, x: x * DEFAULT)), ("scale_of_a_user", 2.0),
     ("made_by_a_user", Made()), ("tensor_of_a_user", torch.ones(2)),
     ("property_of_a_user", property(lambda self: DEFAULT))],
)  # fmt: skip
@pytest.mark.parametrize("owner", [nn.Conv2d, Attention])
def test_what_was_put_on_a_class_of_a_library(owner: Any, name: str, value: Any) -> None:
    module = Small(None if owner is nn.Conv2d else Attention(4, heads=1, dim_head=4))
    check_noticed(module, lambda patch: patch.setattr(owner, name, value, raising=False))


@pytest.mark.parametrize("keep", [lambda x: x, lambda x: [x], lambda x: functools.partial(max, x), lambda x: lambda: x])
def test_a_module_of_python_that_is_kept(keep: Callable[[Any], Any], settings: Any) -> None:
    check_noticed(Small(keep(settings)), lambda patch: patch.setattr(settings, "SCALE_A", 3.0))
    check_noticed(Small(keep(settings)), lambda patch: patch.setattr(settings, "SCALE_A", "2.0"))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("return sample * getattr(settings, 'SCALE_C', 1.0)", "settings"),
        ("return sample * (settings.SCALE_C if hasattr(settings, 'SCALE_C') else 1.0)", "settings"),
        ("return sample * globals().get('SCALE_C', 1.0)", ""),
        ("try:\n        return sample * SCALE_C\n    except NameError:\n        return sample", ""),
        ("return sample * max(1.0, 2.0) * SCALE_C if 'SCALE_C' in globals() else sample", ""),
    ],
)
def test_a_name_that_comes_later(source: str, name: str, settings: Any) -> None:
    module = with_forward(source, settings=settings)
    if name:
        check_noticed(module, lambda patch: patch.setattr(settings, "SCALE_C", 3.0, raising=False))
    else:
        check_noticed(module, lambda patch: patch.setitem(space_of(module), "SCALE_C", 3.0))


def test_a_builtin_that_is_shadowed() -> None:
    module = with_forward("return sample * max(1.0, 2.0)")
    check_noticed(module, lambda patch: patch.setitem(space_of(module), "max", lambda *_: 7.0))


@pytest.mark.parametrize(
    "source",
    [
        "return sample * getattr(settings, f'SCALE_{act}')",
        "return sample * getattr(settings, 'SCALE_' + act, 1.0)",
        "return sample * vars(settings)['SCALE_' + act]",
        "return sample * settings.__dict__['SCALE_' + act]",
        "import settings_of_a_user as own; return sample * getattr(own, f'SCALE_{act}')",
    ],
)
def test_a_name_in_a_module_that_is_computed(source: str, settings: Any) -> None:
    check_noticed(
        with_forward(source, settings=settings, act="A"), lambda patch: patch.setattr(settings, "SCALE_A", 3.0)
    )


@pytest.mark.parametrize("source", ["globals()['SCALE_' + act]", "globals()[act]", "eval(act)", "eval('SCALE_' + act)"])
def test_a_global_whose_name_is_computed(source: str, settings: Any) -> None:
    exec(f"act = 'A'\ndef forward(sample):\n    return sample * {source}", vars(settings))
    module = Small()
    module.forward = settings.forward
    check_noticed(module, lambda patch: patch.setattr(settings, "SCALE_A", 3.0))


@pytest.mark.parametrize(
    "source", ["getattr(settings, 'SCALE_A')", "globals()['act']", "vars(settings).get('SCALE_A')"]
)
def test_a_written_name_reads_nothing_else(source: str, settings: Any) -> None:
    module = with_forward(f"return sample, {source}", settings=settings, act=1)
    state = ModelState(module)
    before = state.read()
    settings.SCALE_OTHER = space_of(module)["other"] = 3.0
    assert state.glance() is before


@pytest.mark.parametrize("made", [Made, MadeByNew, Settings])
def test_what_an_object_is_made_with(made: Any) -> None:
    module = with_forward("return sample * made().scale", made=made)
    check_noticed(module, lambda patch: patch.setitem(globals(), "DEFAULT", 3.0))
    if made is not Settings:
        return
    check_noticed(module, lambda patch: patch.setattr(Settings.__init__, "__defaults__", (3.0, None)))


def test_what_a_member_of_an_enum_has() -> None:
    check_noticed(Small(Kind.soft), lambda patch: patch.setattr(Kind.soft, "scale", 3.0))
    check_noticed(Small([Kind.soft]), lambda patch: patch.setattr(Kind.soft, "sizes", [3.0]))
    check_noticed(
        with_forward("return sample * Kind.soft.scale", Kind=Kind), lambda patch: patch.setattr(Kind.soft, "scale", 3.0)
    )


def test_what_a_tensor_has() -> None:
    for tensor in (module := Small(torch.ones(2))).conv.weight, module.value:
        check_noticed(module, lambda patch, tensor=tensor: patch.setattr(tensor, "scale", 2.0, raising=False))
        tensor.scale = 2.0
        check_noticed(module, lambda patch, tensor=tensor: patch.setattr(tensor, "scale", 3.0))


@pytest.mark.parametrize(
    ("value", "name"),
    [(Pair(1.0, 2.0), "total"), (Slotless(), "scale"), (Factor(2.0), "scaled"), ([Slotless()], "scale")],
)
def test_what_the_class_of_a_value_without_attributes_says(value: Any, name: str) -> None:
    owner = type(value[0] if isinstance(value, list) else value)
    check_noticed(Small(value), lambda patch: patch.setattr(owner, name, lambda self: 3.0))


def test_an_object_without_attributes_is_what_its_class_says() -> None:
    structure = read_structure(Small([Slotless(), Factor(2.0), Pair(1.0, 2.0)]))
    assert structure.portable
    assert structure.key == structure_key(Small([Slotless(), Factor(2.0), Pair(1.0, 2.0)]))
    assert structure.key != structure_key(Small([Slotless(), Factor(3.0), Pair(1.0, 2.0)]))


def test_what_a_weak_reference_leads_to() -> None:
    alive, held = Held(), Held()
    check_noticed(Small(weakref.ref(alive)), lambda patch: patch.setattr(alive, "scale", 3.0))
    state = ModelState(Small(weakref.ref(held)))
    before = state.read()
    del held
    gc.collect()
    assert state.glance().structure != before.structure


def test_a_weak_dictionary_is_read_by_its_entries() -> None:
    module = Small(weakref.WeakKeyDictionary())
    module.value[module.conv] = 2.0
    assert read_structure(module).portable
    check_noticed(module, lambda patch: patch.setitem(module.value, module.conv, 3.0))


def test_what_cannot_be_read_has_a_number_of_its_own() -> None:
    """Another object in the same place in memory is another one."""

    def numbers() -> Iterator[str]:
        for _ in range(20):
            reader = Reader(lambda reader, value: reader.opaque(value), (), {})
            yield reader.digest(lambda reader=reader: reader.visit(torch.Generator()))
            yield reader.digest(lambda reader=reader: reader.visit(object()))

    assert len(set(numbers())) == 40
