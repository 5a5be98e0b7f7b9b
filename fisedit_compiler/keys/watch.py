"""Whether what was read of a module is still what it is: a look that takes a fraction of a millisecond.

Every dictionary, list and object that ``structure.py`` read is kept with a shallow copy. Comparing the two looks at
identities first, in C; only what was exchanged is compared by value. Contents of tensors are not looked at, only their
versions and addresses.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from types import CellType
from typing import Any

import numpy as np
from torch import Tensor

_MISSING = object()


class Watch:
    """Places that were read, and what they held then."""

    def __init__(self) -> None:
        # Two lists, so that one comparison in C looks at all of them.
        self._live: list[Any] = []
        self._kept: list[Any] = []
        self._empty: list[Any] = []
        self._tensors_of: list[tuple[Mapping[str, Tensor | None], tuple[int, ...]]] = []
        self._tensors: list[Tensor] = []
        self._stamps: list[tuple[int, int]] = []
        self._items: list[tuple[dict[str, Any], str, Any]] = []
        self._attributes: list[tuple[Any, str, Any]] = []
        self._cells: list[tuple[CellType, Any]] = []
        self._arrays: list[tuple[np.ndarray, int]] = []

    # -- what is watched -------------------------------------------------------------------------

    def attributes(self, values: Mapping[str, Any]) -> None:
        """Attributes of an object, a module or a class."""
        self._pair(values, dict(values))

    def container(self, value: Any) -> None:
        """A dictionary, list, set or deque."""
        if not value:
            self._empty.append(value)
        else:
            self._pair(value, dict(value) if isinstance(value, Mapping) else _copied(value))

    def _pair(self, live: Any, kept: Any) -> None:
        self._live.append(live)
        self._kept.append(kept)

    def tensors_of(self, values: Mapping[str, Tensor | None]) -> None:
        """Parameters or buffers of a module, by identity: exchanged ones of several elements refuse to be compared."""
        if not values:
            self._empty.append(values)
        elif any(value is not None and value.numel() < 2 for value in values.values()):
            self._tensors_of.append((values, tuple(map(id, values.values()))))
        else:
            self._pair(values, dict(values))

    def tensor(self, value: Tensor) -> None:
        """A tensor whose contents were read."""
        self._tensors.append(value)
        self._stamps.append(stamp(value))

    def array(self, value: np.ndarray) -> None:
        self._arrays.append((value, _checksum(value)))

    def cell(self, cell: CellType) -> None:
        """What a function closes over."""
        self._cells.append((cell, _contents(cell)))

    def item(self, values: dict[str, Any], name: str) -> None:
        """One global of a function's module."""
        self._items.append((values, name, values.get(name, _MISSING)))

    def attribute(self, value: Any, name: str) -> None:
        """One slot of an object."""
        self._attributes.append((value, name, getattr(value, name, _MISSING)))

    # -- looking ---------------------------------------------------------------------------------

    def changed(self) -> bool:
        """Whether anything differs; may say yes where only an equal value was put in another's place."""
        if any(self._empty):
            return True
        try:
            if self._live != self._kept:
                return True
        except Exception:  # values that cannot be compared were exchanged: identical ones are never asked
            return True
        for values, identities in self._tensors_of:
            if tuple(map(id, values.values())) != identities:
                return True
        return (
            any(values.get(name, _MISSING) is not kept for values, name, kept in self._items)
            or any(getattr(value, name, _MISSING) is not kept for value, name, kept in self._attributes)
            or any(_contents(cell) is not kept for cell, kept in self._cells)
            or any(_checksum(array) != kept for array, kept in self._arrays)
            or stamps(self._tensors) != self._stamps
        )


def stamp(value: Tensor) -> tuple[int, int]:
    """Version and address of a tensor: both stay while nobody writes to it or exchanges its memory."""
    try:
        return (0 if value.is_inference() else value._version), value.data_ptr()
    except RuntimeError:  # a wrapper without memory of its own
        return (0 if value.is_inference() else value._version), id(value)


def stamps(values: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Version and address of every tensor."""
    try:
        return [(value._version, value.data_ptr()) for value in values]
    except RuntimeError:
        return [stamp(value) for value in values]


def _copied(value: Any) -> Any:
    return value.copy() if hasattr(value, "copy") else type(value)(value)


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _MISSING


def _checksum(value: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(value).view(np.uint8).reshape(-1).data) if value.size else 0
