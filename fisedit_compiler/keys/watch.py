"""Whether what was read of a module is still what it is: a look that takes a fraction of a millisecond.

Every dictionary, list and object that ``structure.py`` read is kept with a shallow copy. Comparing the two looks at
identities first, in C; only what was exchanged is compared by value. Where it is known how often dictionaries were
written to (``writes.py``), only those that were are compared. Contents of tensors are not looked at, only their
versions and addresses.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from types import CellType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisedit_compiler.keys.writes import clock, dict_version

_MISSING = object()
_LARGE = 6
"""Entries from which asking for the version costs less than comparing the dictionary."""

Stamps = tuple[list[int], list[int]]
"""Versions and addresses of tensors."""


class Watch:
    """Places that were read, and what they held then."""

    def __init__(self) -> None:
        self._clock = clock()
        self._reading: int | None = None
        # Pairs of lists, so that one comparison in C looks at all of them. Those in the first pair count their writes.
        self._timed: list[Any] = []
        self._timed_kept: list[Any] = []
        self._live: list[Any] = []
        self._kept: list[Any] = []
        self._large: list[dict[str, Any]] = []
        self._large_kept: list[dict[str, Any]] = []
        self._large_versions: list[int] = []
        self._empty: list[Any] = []
        self._tensors_of: list[tuple[Mapping[str, Tensor | None], tuple[int, ...]]] = []
        self._tensors: list[Tensor] = []
        self._stamps: list[Stamps] = []
        self._items: list[tuple[dict[str, Any], str, Any]] = []
        self._attributes: list[tuple[Any, str, Any]] = []
        self._cells: list[tuple[CellType, Any]] = []
        self._arrays: list[tuple[Any, int]] = []
        self._asked: list[tuple[Callable[[], Any], Any]] = []

    # -- what is watched -------------------------------------------------------------------------

    def attributes(self, values: Mapping[str, Any]) -> None:
        """Attributes of an object, a module or a class."""
        if dict_version is not None and self._clock is None and type(values) is dict and len(values) >= _LARGE:
            self._large_versions.append(dict_version(values))
            self._large.append(values)
            self._large_kept.append(dict(values))
        else:
            self._pair(values, dict(values))

    def container(self, value: Any) -> None:
        """A dictionary, list, set or deque."""
        if not value:
            self._empty.append(value)
        else:
            self._pair(value, dict(value) if isinstance(value, Mapping) else _copied(value))

    def _pair(self, live: Any, kept: Any) -> None:
        timed = self._is_timed(live)
        (self._timed if timed else self._live).append(live)
        (self._timed_kept if timed else self._kept).append(kept)

    def _is_timed(self, values: Any) -> bool:
        return self._clock is not None and isinstance(values, Mapping) and self._clock.watch(values)

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
        self._stamps.append(stamps([value]))

    def array(self, value: Any) -> None:
        """A numpy array, or what else has numbers in memory of its own."""
        self._arrays.append((value, checksum(value)))

    def cell(self, cell: CellType) -> None:
        """What a function closes over."""
        self._cells.append((cell, _contents(cell)))

    def asked(self, question: Callable[[], Any]) -> None:
        """What only a call tells, such as a context variable's value."""
        self._asked.append((question, question()))

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
            if self._timed_changed() or self._live != self._kept or (self._large and self._large_changed()):
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
            or any(question() is not kept for question, kept in self._asked)
            or any(checksum(array) != kept for array, kept in self._arrays)
            or any(stamps([tensor]) != kept for tensor, kept in zip(self._tensors, self._stamps, strict=True))
        )

    def _timed_changed(self) -> bool:
        if self._clock is None:
            return False
        reading = self._clock.read()
        if reading == self._reading:
            return False
        if self._timed != self._timed_kept:
            return True
        self._reading = reading  # nothing was written to, or what was there before
        return False

    def _large_changed(self) -> bool:
        assert dict_version is not None
        versions = list(map(dict_version, self._large))
        if versions == self._large_versions:
            return False
        if self._large != self._large_kept:
            return True
        self._large_versions = versions  # written to, with what was there before
        return False


def stamps(values: Sequence[Tensor]) -> Stamps:
    """Versions and addresses of tensors: both stay while nobody writes to one or exchanges its memory."""
    try:
        return list(map(_version_of, values)), list(map(_address_of, values))
    except RuntimeError:  # an inference tensor, which has no version, or a wrapper without memory of its own
        return [0 if value.is_inference() else value._version for value in values], list(map(_own_address, values))


# Called by ``map``, which is twice as fast as a comprehension over attributes.
_version_of: Callable[[Tensor], int] = vars(torch._C.TensorBase)["_version"].__get__
_address_of: Callable[[Tensor], int] = Tensor.data_ptr


def _own_address(value: Tensor) -> int:
    try:
        return value.data_ptr()
    except RuntimeError:
        return id(value)


def _copied(value: Any) -> Any:
    return value.copy() if hasattr(value, "copy") else type(value)(value)


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _MISSING


def checksum(value: Any) -> int:
    """CRC of the contents of an array, a bytearray or whatever else shows its memory."""
    if isinstance(value, np.ndarray):
        return zlib.crc32(np.ascontiguousarray(value).view(np.uint8).reshape(-1).data) if value.size else 0
    with memoryview(value) as view:
        return zlib.crc32(view if view.contiguous else view.tobytes())
