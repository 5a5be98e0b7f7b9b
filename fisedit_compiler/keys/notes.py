"""What a forward writes to its own module: a shape it notes, a counter it keeps."""

from __future__ import annotations

from array import array
from collections.abc import MutableMapping, MutableSequence, MutableSet
from typing import Any

from torch import nn

from fisedit_compiler.keys.structure import Note

_CONTAINERS = (MutableMapping, MutableSequence, MutableSet)
_OF_TORCH = frozenset(vars(nn.Module()))


class AttributesBefore:
    """The attributes of a module and its submodules at one moment; containers with what was in them."""

    def __init__(self, module: nn.Module) -> None:
        self._parts = [(path, part, dict(vars(part))) for path, part in module.named_modules()]
        self._contents = [
            (path, name, value, _copied(value))
            for path, _, attributes in self._parts
            for name, value in attributes.items()
            if isinstance(value, _CONTAINERS) and name not in _OF_TORCH
        ]

    def written(self) -> frozenset[Note]:
        """The attributes that hold something else now."""
        exchanged = {
            (path, name)
            for path, part, before in self._parts
            for name in {*before, *vars(part)}
            if vars(part).get(name, self) is not before.get(name, self)
        }
        filled = {(path, name) for path, name, value, before in self._contents if not _same(value, before)}
        return frozenset(exchanged | filled)

    def restore(self) -> None:
        """Put exchanged attributes back, and what was in containers."""
        for _, part, before in self._parts:
            attributes = vars(part)
            for name in [name for name in attributes if name not in before]:
                del attributes[name]
            for name, value in before.items():
                if attributes.get(name, self) is not value:
                    attributes[name] = value
        for _, _, value, before in self._contents:
            if not _same(value, before):
                _refill(value, before)


def _copied(value: Any) -> Any:
    return dict(value) if isinstance(value, MutableMapping) else list(value)


def _refill(value: Any, before: Any) -> None:
    if isinstance(value, MutableSequence):
        del value[:]  # an array has no clear()
        value.extend(before)
        return
    value.clear()
    if isinstance(value, MutableMapping):
        value.update(before)
    else:
        value |= set(before)


def _same(value: Any, before: Any) -> bool:
    now = _copied(value)
    if isinstance(now, dict):
        return now.keys() == before.keys() and all(now[key] is before[key] for key in now)
    if isinstance(value, (bytearray, array)):  # makes its elements anew each time it is asked
        return bool(now == before)
    return len(now) == len(before) and all(left is right for left, right in zip(now, before, strict=True))
