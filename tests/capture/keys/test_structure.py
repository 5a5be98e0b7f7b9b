"""The structure key tells two modules apart whose forwards differ in anything that a forward can read."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fisedit_compiler.capture.keys.model import ModelState
from fisedit_compiler.capture.keys.structure import read_structure, structure_key
from tests.support.zoo import ZOO

ROOT = Path(__file__).parents[3]
SCALE = 2.0


@dataclass
class Settings:
    heads: int = 2


class Plain:
    def __init__(self, value: Any) -> None:
        self.value = value


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class PrivatelySlotted:
    __slots__ = ("__value",)

    def __init__(self, value: Any) -> None:
        self.__value = value

    def __deepcopy__(self, memo: Any) -> Any:
        return PrivatelySlotted(self.__value)


class Text(str):
    pass


class Number(int):
    pass


def noted_text(value: Any) -> Text:
    text = Text("a")
    text.value = value  # type: ignore[attr-defined]
    return text


def noted_number(value: Any) -> Number:
    number = Number(1)
    number.value = value  # type: ignore[attr-defined]
    return number


def made_class(value: Any) -> type:
    """As packages make classes that wrap others, such as tomesd: their code is the package's, what they hold is not."""

    class Made:
        def __call__(self, x: Tensor) -> Tensor:
            return x * value

        def __deepcopy__(self, memo: Any) -> Any:
            return type(self)()

    Made.__module__ = "torch.nn.modules.activation"
    return Made


class Small(nn.Module):
    default: ClassVar[int] = 1

    def __init__(self, value: Any = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)
        self._value = value

    def forward(self, sample: Tensor) -> Tensor:
        return self.conv(sample) * SCALE


def closing_over(value: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: x * value


def with_default(value: Any) -> Callable[..., Tensor]:
    def scaled(x: Tensor, by: Any = value) -> Tensor:
        return x * by

    return scaled


def noted(value: Any) -> Callable[..., Tensor]:
    def scaled(x: Tensor) -> Tensor:
        return x * scaled.by  # type: ignore[attr-defined, no-any-return]

    scaled.by = value  # type: ignore[attr-defined]
    return scaled


PAIRS: dict[str, tuple[Any, Any]] = {
    "private attribute": (1, 2),
    "types of equal numbers": (1, 1.0),
    "flag and number": (True, 1),
    "zero's sign": (0.0, -0.0),
    "dataclass field": (Settings(2), Settings(4)),
    "plain object": (Plain(1), Plain(2)),
    "object in an object": (Plain(Plain([1])), Plain(Plain([2]))),
    "slots": (Slotted(1), Slotted(2)),
    "private slot": (PrivatelySlotted(1), PrivatelySlotted(2)),
    "text": (Text("a"), Text("b")),
    "attribute of a text": (noted_text(1), noted_text(2)),
    "attribute of a number": (noted_number(1), noted_number(2)),
    "numbers with attributes in a tuple": ((noted_number(1), 1), (noted_number(2), 1)),
    "class that a function made": (made_class(1)(), made_class(2)()),
    "bound keyword": (partial(F.leaky_relu, negative_slope=0.1), partial(F.leaky_relu, negative_slope=0.2)),
    "bound argument": (partial(torch.add, 1), partial(torch.add, 2)),
    "closure": (closing_over(1.0), closing_over(2.0)),
    "closure of an object": (closing_over(Settings(1)), closing_over(Settings(2))),
    "default argument": (with_default(1.0), with_default(2.0)),
    "bound method": (Plain(1).__init__, Plain(2).__init__),
    "lambda": (lambda x: x + 1, lambda x: x + 2),
    "builtin": (torch.sin, torch.cos),
    "class": (Plain, Slotted),
    "list": ([1, 2], [2, 1]),
    "dictionary": ({"a": 1}, {"a": 2}),
    "order of a dictionary": ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    "set": ({1, 2}, {1, 3}),
    "tuple and list": ((1, 2), [1, 2]),
    "tensor": (torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])),
    "array": (np.array([1, 2]), np.array([2, 1])),
    "array of Python's": (array("d", [1, 2]), array("d", [2, 1])),
    "bytes that can be written to": (bytearray(b"ab"), bytearray(b"ba")),
    "attribute of a function": (noted(1), noted(2)),
    "dtype": (torch.float16, torch.bfloat16),
    "module in a list": ([nn.ReLU()], [nn.GELU()]),
    "module in an object": (Plain(nn.LeakyReLU(0.1)), Plain(nn.LeakyReLU(0.2))),
    "module in a closure": (closing_over(nn.LeakyReLU(0.1)), closing_over(nn.LeakyReLU(0.2))),
    "none and absent": (None, Plain(None)),
}


@pytest.mark.parametrize("case", PAIRS)
def test_two_values_are_two_structures(case: str) -> None:
    left, right = (structure_key(Small(value)) for value in PAIRS[case])
    assert left != right


@pytest.mark.parametrize("case", PAIRS)
def test_equal_values_are_one_structure(case: str) -> None:
    value = PAIRS[case][0]
    assert structure_key(Small(value)) == structure_key(Small(value))
    if not isinstance(value, type) and "lambda" not in repr(value):
        assert structure_key(Small(value)) == structure_key(Small(copy.deepcopy(value)))


def add_hook(module: Small) -> Any:
    return module.conv.register_forward_hook(lambda *_: None)


def add_global_reader(module: Small) -> None:
    module.forward = lambda sample: sample + SCALE  # type: ignore[method-assign]


CHANGES: dict[str, Callable[[Small], Any]] = {
    "a forward hook": add_hook,
    "a forward pre-hook": lambda module: module.register_forward_pre_hook(lambda *_: None),
    "a hook with keywords": lambda module: module.register_forward_hook(lambda *_, **__: None, with_kwargs=True),
    "a forward replaced on the instance": add_global_reader,
    "a forward replaced on a part": lambda module: setattr(module.conv, "forward", lambda x: x),
    "a private attribute of a part": lambda module: setattr(module.conv, "_scale", 3),
    "another stride": lambda module: setattr(module.conv, "stride", (2, 2)),
    "training of a part": lambda module: module.conv.train(not module.conv.training),
    "another dtype": lambda module: module.half(),
    "a buffer": lambda module: module.register_buffer("extra", torch.zeros(2)),
    "a part": lambda module: module.add_module("more", nn.ReLU()),
    "a part removed": lambda module: setattr(module, "conv", None),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_is_seen(case: str) -> None:
    module = Small()
    state = ModelState(module)
    before = state.read()
    assert state.glance() is before
    CHANGES[case](module)
    assert state.glance().structure != before.structure


def test_a_change_that_is_taken_back_gives_the_former_key() -> None:
    module = Small([1])
    state = ModelState(module)
    before = state.read()
    handle = add_hook(module)
    module._value.append(2)
    assert state.glance() != before
    handle.remove()
    module._value.pop()
    assert state.read() == before


def test_what_is_deep_inside_is_watched() -> None:
    inner = {"scaling": {"a": 1.0}}
    module = Small(Plain([Slotted(inner), closing_over(inner)]))
    state = ModelState(module)
    before = state.read()
    inner["scaling"]["a"] = 2.0
    assert state.glance().structure != before.structure
    inner["scaling"]["a"] = 1.0
    assert state.glance().structure == before.structure


@pytest.mark.parametrize("attribute", ["__defaults__", "__kwdefaults__", "__code__"])
def test_a_part_of_a_function_that_was_exchanged(attribute: str) -> None:
    def scaled(x: Tensor, by: float = 2.0, *, more: float = 1.0) -> Tensor:
        return x * by + more

    def other(x: Tensor, by: float = 3.0, *, more: float = 2.0) -> Tensor:
        return x - by - more

    state = ModelState(Small(scaled))
    before = state.read()
    setattr(scaled, attribute, getattr(other, attribute))
    assert state.glance().structure != before.structure


@pytest.mark.parametrize("path", ["by data", "by numpy"])
def test_a_tensor_that_is_no_parameter_and_was_rewritten(path: str) -> None:
    constant = torch.arange(4.0)
    state = ModelState(Small(constant))
    before = state.read()
    (constant.data if path == "by data" else torch.from_numpy(constant.numpy())).mul_(2)
    assert state.read().structure != before.structure
    constant.data.div_(2)
    assert state.read() == before


@pytest.mark.parametrize("value", [bytearray(b"ab"), array("d", [1.0, 2.0])])
def test_numbers_in_memory_are_watched(value: Any) -> None:
    state = ModelState(Small(value))
    before = state.read()
    value[0] = 7
    assert state.glance().structure != before.structure
    value.append(9)
    assert state.glance().structure != before.structure


def test_a_method_replaced_on_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    own, installed = ModelState(Small()), ModelState(nn.Sequential(nn.Conv2d(3, 3, 3)))
    keys = own.read(), installed.read()
    monkeypatch.setattr(Small, "forward", lambda self, sample: sample)
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, sample: sample)
    assert own.glance().structure != keys[0].structure
    assert installed.glance().structure != keys[1].structure


def test_a_class_attribute(monkeypatch: pytest.MonkeyPatch) -> None:
    state = ModelState(Small())
    before = state.read()
    monkeypatch.setattr(Small, "default", 2)
    assert state.glance().structure != before.structure


def test_what_cannot_be_read_is_of_this_process_only() -> None:
    generator = torch.Generator()
    structure = read_structure(Small(generator))
    assert not structure.portable
    assert read_structure(Small(generator)).key == structure.key
    assert read_structure(Small(torch.Generator())).key != structure.key
    assert read_structure(Small(threading.Lock())).portable, "a lock holds nothing that a result depends on"
    assert read_structure(ZOO["sdxl"]().module).portable


def test_cycles_end() -> None:
    one, two = Plain(None), Plain(None)
    one.value, two.value = two, one
    module = Small(one)
    module._self = [module]  # type: ignore[assignment]
    assert structure_key(module) == structure_key(module)


def test_the_parts_that_differ_are_named() -> None:
    module = ZOO["sd15"]().module
    changed = copy.deepcopy(module)
    changed.mid_block.attentions[0].transformer_blocks[0].attn1.scale *= 2
    (place,) = read_structure(changed).differences(read_structure(module))
    assert place == "mid_block.attentions.0.transformer_blocks.0.attn1"


def test_another_process_reads_the_same(tmp_path: Path) -> None:
    script = tmp_path / "user_model.py"
    script.write_text(
        "from functools import partial\n"
        "from torch import nn\n"
        "from torch.nn import functional as F\n"
        "from fisedit_compiler.capture.keys import structure_key\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.act, self._names = partial(F.leaky_relu, negative_slope=0.2), {'b', 'a', 'c', 'd'}\n"
        "        self.conv = nn.Conv2d(3, 3, 3)\n"
        "    def forward(self, x):\n"
        "        return self.act(self.conv(x)) if 'a' in {'a', 'b', 'c'} else x\n"
        "net = Net()\n"
        "net.conv.register_forward_hook(lambda *_: None)\n"
        "print(structure_key(net))\n"
    )
    keys = {
        subprocess.run(
            [sys.executable, str(script)],
            env={"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(seed), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in (1, 2)
    }
    assert len(keys) == 1
