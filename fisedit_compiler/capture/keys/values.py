"""How numbers in memory, containers and objects are written down."""

from __future__ import annotations

import functools
import logging
import weakref
import zlib
from array import array
from collections import defaultdict
from collections.abc import Mapping, Set
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fisedit_compiler.capture.keys.drawn import state_of
from fisedit_compiler.capture.keys.notes import is_of_a_capture
from fisedit_compiler.capture.keys.reader import PLAIN, Reader, is_of_this_package
from fisedit_compiler.capture.keys.watch import checksum

_WITH_ATTRIBUTES = (int, float, complex, str, bytes)
_IN_PYTHON = 1 << 9
_WEAK = (weakref.WeakSet, weakref.WeakKeyDictionary, weakref.WeakValueDictionary)


def write_form(reader: Reader, name: str, tensor: Tensor) -> None:
    """Shape, dtype and what else of a tensor decides which graph it fits."""
    form = (tuple(tensor.shape), tensor.dtype, tensor.device.type, tensor.layout)
    reader.say(f"{name} {form}")
    if type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "__tensor_flatten__"):
        reader.say(f"{type(tensor).__module__}.{type(tensor).__qualname__}")
        reader.visit(tensor.__tensor_flatten__()[1])


def write_attributes_of_tensor(reader: Reader, tensor: Tensor, step: str = "") -> None:
    """What somebody put on a tensor, such as the scale of a quantized weight; not what loading and compiling note."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return
    held = vars(tensor)
    if not held:
        reader.watch.empty(held)
        return
    reader.watch.form_of(tensor)
    read = reader.attributes(held)
    for name in sorted(read):
        if not name.startswith(("_dynamo", "_is_hf")):
            reader.say(f".{name}")
            reader.visit(read[name], f"{step}.{name}")


def write_constant(reader: Reader, value: Tensor) -> None:
    """A tensor that is no parameter and no buffer: a graph closes over it, so its contents count here."""
    if is_of_a_capture(value):
        reader.say("of a capture")
        return
    write_form(reader, "tensor", value)
    if not reader.reads_contents():
        return
    write_attributes_of_tensor(reader, value)
    reader.watch.tensor(value, reader.place)
    reader.constants[str(len(reader.constants))] = value
    if value.is_meta or type(value) not in (Tensor, nn.Parameter):
        return
    reader.say(str(_bytes_of(value)))


def write_array(reader: Reader, value: np.ndarray) -> None:
    reader.say(f"array {value.shape} {value.dtype}")
    if value.dtype.hasobject:
        reader.watch.part(value, lambda live: dict(enumerate(live.ravel().tolist())))
        reader.visit(value.tolist())
    elif reader.reads_contents():
        reader.say(str(checksum(value)))
        reader.watch.array(value, reader.place)


def write_bytes(reader: Reader, value: bytearray | memoryview | array[Any]) -> None:
    reader.say(type(value).__name__)
    if reader.reads_contents():
        reader.say(str(checksum(value)))
        reader.watch.array(value, reader.place)


def write_mapping(reader: Reader, value: Mapping[Any, Any]) -> None:
    read = reader.elements(value)
    # diffusers' configs note where a model came from and, in an order that differs from process to process,
    # which values were defaults.
    config = type(value).__name__ == "FrozenDict"
    held = (value if read is None else read).items()
    items = [(key, item) for key, item in held if not (config and str(key).startswith("_"))]
    reader.say(f"{type(value).__qualname__} of {len(items)}")
    for key, item in items:
        reader.visit(key)
        reader.visit(item, f"[{key!r}]")
    if isinstance(value, defaultdict):
        reader.watch.attribute(value, "default_factory", reader.place)
        reader.visit(value.default_factory, ".default_factory")
    if not config and type(value) not in (dict, MappingProxyType, *_WEAK):
        _write_rest(reader, value)


def write_sequence(reader: Reader, value: Any) -> None:
    read = None if isinstance(value, tuple) else reader.elements(value)
    items = dict(enumerate(value)) if read is None else read
    reader.say(f"{type(value).__qualname__} of {len(items)} {getattr(value, 'maxlen', None)}")
    for index, item in items.items():
        reader.visit(item, f"[{index}]")
    if type(value) not in (list, tuple):
        _write_rest(reader, value)


def write_set(reader: Reader, value: Set[Any]) -> None:
    read = None if isinstance(value, frozenset) else reader.elements(value)
    items = list(value if read is None else read)
    if all(type(item) in PLAIN for item in items):
        reader.say(f"set {sorted(map(repr, items))}")
    else:
        for item in sorted(items, key=lambda item: f"{type(item).__module__}.{type(item).__qualname__} {item!r}"):
            reader.visit(item, "{}")
    if type(value) not in (set, frozenset, *_WEAK):
        _write_rest(reader, value)


def _write_rest(reader: Reader, value: Any) -> None:
    """Attributes, and the class also of what has no place for any."""
    if not write_attributes(reader, value):
        reader.visit(type(value))


def write_object(reader: Reader, value: Any) -> None:
    """What is none of the others: by its attributes, or as itself where it has no place for any."""
    if is_of_a_capture(value):
        reader.say("of a capture")
    elif is_of_this_package(value):
        reader.say(f"of this package {type(value).__qualname__}")
    elif isinstance(value, logging.Logger):
        reader.say(f"logger {value.name}")
    elif isinstance(value, weakref.ref):
        reader.say("weak")
        reader.watch.asked(lambda: "gone" if value() is None else "there", reader.place)
        outer, reader.watch.holds = reader.watch.holds, False
        reader.visit(value(), "()")
        reader.watch.holds = outer
    elif isinstance(value, ContextVar):
        reader.say(f"context variable {value.name}")
        if reader.reads_contents():
            reader.watch.asked(functools.partial(value.get, None), reader.place, value.set)
            reader.visit(value.get(None))
    elif type(value).__name__ in ("lock", "RLock", "_RLock"):
        reader.say("lock")
    else:
        plain = next((base for base in _WITH_ATTRIBUTES if isinstance(value, base)), None)
        if plain is not None:  # a number or text with attributes of its own
            reader.say(plain.__repr__(value))
        if (state := state_of(value)) is not None and reader.reads_contents():
            reader.say(state)
            reader.watch.asked(lambda: state_of(value), reader.place)
        if write_attributes(reader, value):
            return
        reader.visit(type(value))
        if plain is None and not _holds_nothing(value):
            reader.opaque(value)


def write_attributes(reader: Reader, value: Any) -> bool:
    """Attributes and slots of an object; whether it has any place for them."""
    attributes = getattr(value, "__dict__", None)
    slots = [name for base in type(value).__mro__ for name in _slots(base)]
    if attributes is None and not slots:
        return False
    reader.say("object")
    reader.watch.form_of(value)
    reader.visit(type(value))
    if isinstance(attributes, dict):
        read = reader.attributes(attributes)
        for name in sorted(read, key=str):
            reader.say(f".{name}")
            reader.visit(read[name], f".{name}")
    for name in slots:
        if reader.attribute(value, name) and hasattr(value, name):
            reader.say(f".{name}")
            reader.visit(getattr(value, name), f".{name}")
    return True


def _holds_nothing(value: Any) -> bool:
    """Whether an object is all its class says: one of a class in Python without a place for attributes."""
    return bool(type(value).__flags__ & _IN_PYTHON) and type(value).__basicsize__ == object.__basicsize__


def _slots(base: type) -> list[str]:
    slots = vars(base).get("__slots__", ())
    names = [slots] if isinstance(slots, str) else list(slots)
    return [_mangled(base, name) for name in names if name not in ("__dict__", "__weakref__")]


def _mangled(base: type, name: str) -> str:
    """A private name as Python keeps it."""
    return f"_{base.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name


def _bytes_of(tensor: Tensor) -> int:
    """CRC of a tensor's contents, in logical order."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    dense = plain.to_dense() if plain.layout is not torch.strided else plain
    flat = dense.cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0
