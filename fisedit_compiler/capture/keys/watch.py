"""Whether what was read of a module is still what it is: a look that takes a fraction of a millisecond.

Every dictionary, list and object that ``structure.py`` read is kept with a shallow copy. What is in them is compared by
identity, in C: 2 and 2.0 are equal, and so are objects that say so. Only what was exchanged is looked at more closely;
an equal number, text or tuple of such of the same type is no change. Where it is known how often dictionaries were
written to (``writes.py``), only those that were are compared. Contents of tensors are not looked at, only their
versions and addresses.
"""

from __future__ import annotations

import weakref
import zlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from itertools import chain
from operator import attrgetter, is_
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisedit_compiler.capture.keys.notes import Change, Drawn, Reordered, Rewritten, entries
from fisedit_compiler.capture.keys.writes import clock, dict_version, dictionary_of

_MISSING = object()
_LARGE = 6
"""Entries from which asking for the version costs less than comparing the dictionary."""

Stamps = tuple[list[int], list[int]]
"""Versions and addresses of tensors."""


class Watch:
    """Places that were read, and what they held then.

    Every place has a name (``notes.py``), so that it can be told what was written where.
    """

    def __init__(self) -> None:
        self.holds = True
        """Whether objects may be kept alive; not those that a weak reference leads to."""
        self._clock = clock()
        self._reading: int | None = None
        self._places: list[tuple[str, Any, Any, bool, type | None]] = []
        # Pairs of lists, so that one comparison in C looks at all of them. Those in the first pair count their writes.
        self._timed: list[Any] = []
        self._timed_kept: list[Any] = []
        self._timed_dicts: list[dict[Any, Any]] = []
        self._timed_versions: list[int] | None = None
        self._live: list[Any] = []
        self._kept: list[Any] = []
        # What comparing does not tell of them, and what it was: the order of keys, and elements that are equal without
        # being the same.
        self._views: list[Any] = []
        self._seen: list[Any] = []
        self._others: list[tuple[Any, Any]] = []
        self._objects: list[Any] = []
        self._classes: list[type] = []
        self._with_attributes: list[Any] = []
        self._dictionaries: list[dict[str, Any]] = []
        self._weak: list[tuple[weakref.ref[Any], type, Any]] = []
        self._large: list[dict[str, Any]] = []
        self._large_kept: list[dict[str, Any]] = []
        self._large_versions: list[int] = []
        self._empty: list[Any] = []
        self._parts: list[tuple[Any, Callable[[Any], dict[Any, Any]], dict[Any, Any]]] = []
        self._tensors_of: list[tuple[Mapping[str, Tensor | None], tuple[int, ...]]] = []
        self._tensors: list[Tensor] = []
        self._stamps: list[Stamps] = []
        self._tensor_places: list[str] = []
        self._items: list[tuple[dict[str, Any], str, Any]] = []
        self._item_places: list[str] = []
        self._attributes: list[tuple[Any, str, Any]] = []
        self._attribute_places: list[str] = []
        self._arrays: list[tuple[Any, int]] = []
        self._array_places: list[tuple[str, Any]] = []
        self._asked: list[tuple[Callable[[], Any], Any]] = []
        self._asked_places: list[tuple[str, Callable[[Any], object] | None]] = []

    # -- what is watched -------------------------------------------------------------------------

    def attributes(self, values: Mapping[str, Any], place: str = "", owner: type | None = None) -> None:
        """Attributes of an object, a module or a class, which is then their ``owner``."""
        kept = dict(values)
        self._places.append((place, values, kept, False, owner))
        if dict_version is not None and self._clock is None and type(values) is dict and len(values) >= _LARGE:
            self._large_versions.append(dict_version(values))
            self._large.append(values)
            self._large_kept.append(kept)
        else:
            self._pair(values, kept, ordered=False)

    def container(self, value: Any, place: str = "") -> None:
        """A dictionary, list, set or deque."""
        kept = dict(value) if isinstance(value, Mapping) else _copied(value)
        self._places.append((place, value, kept, True, None))
        if not value:
            self._empty.append(value)
        else:
            self._pair(value, kept)

    def part(self, value: Any, read: Callable[[Any], dict[Any, Any]]) -> None:
        """Only what ``read`` gives of a dictionary, list or set."""
        self._parts.append((value, read, read(value)))

    def form_of(self, value: Any) -> None:
        """The class of an object and the dictionary of its attributes, both of which anybody may exchange."""
        held = getattr(value, "__dict__", None)
        if not self.holds:
            with suppress(TypeError):  # of some there are no weak references
                self._weak.append((weakref.ref(value), type(value), held))
            return
        self._objects.append(value)
        self._classes.append(type(value))
        if type(held) is dict:
            self._with_attributes.append(value)
            self._dictionaries.append(held)

    def empty(self, values: Any) -> None:
        """What is to stay empty."""
        self._empty.append(values)

    def _pair(self, live: Any, kept: Any, *, ordered: bool = True) -> None:
        # No event tells of a new order of an OrderedDict, which it keeps beside the dictionary.
        if not (ordered and isinstance(live, OrderedDict)) and self._is_timed(live):
            self._timed.append(live)
            self._timed_kept.append(kept)
            self._timed_dicts.append(dictionary_of(live))
        elif (views := _views(live, ordered)) is None:
            self._others.append((live, kept))
        else:
            self._live.append(live)
            self._kept.append(kept)
            self._views += views
            self._seen += chain.from_iterable(views)

    def _is_timed(self, values: Any) -> bool:
        return self._clock is not None and isinstance(values, Mapping) and self._clock.watch(values)

    def tensors_of(self, values: Mapping[str, Tensor | None]) -> None:
        """Parameters or buffers of a module, by identity: exchanged ones of several elements refuse to be compared."""
        if not values:
            self._empty.append(values)
        elif any(value is not None and value.numel() < 2 for value in values.values()):
            self._tensors_of.append((values, tuple(map(id, values.values()))))
        else:
            self._pair(values, dict(values), ordered=False)

    def tensor(self, value: Tensor, place: str = "") -> None:
        """A tensor whose contents were read."""
        self._tensors.append(value)
        self._stamps.append(stamps([value]))
        self._tensor_places.append(place)

    def array(self, value: Any, place: str = "") -> None:
        """A numpy array, or what else has numbers in memory of its own."""
        self._arrays.append((value, checksum(value)))
        self._array_places.append((place, value[:] if isinstance(value, (bytearray, array)) else None))

    def item(self, values: dict[str, Any], name: str, place: str = "") -> None:
        """One global of a function's module."""
        self._items.append((values, name, values.get(name, _MISSING)))
        self._item_places.append(place)

    def attribute(self, value: Any, name: str, place: str = "") -> None:
        """One slot of an object, or what a function closes over (``cell_contents``)."""
        self._attributes.append((value, name, _attribute(value, name)))
        self._attribute_places.append(place)

    def asked(self, question: Callable[[], Any], place: str = "", put: Callable[[Any], object] | None = None) -> None:
        """What only a call tells, such as a context variable's value; ``put`` writes it back. Texts are compared."""
        self._asked.append((question, question()))
        self._asked_places.append((place, put))

    # -- looking ---------------------------------------------------------------------------------

    def changed(self) -> bool:
        """Whether anything differs; may say yes where only an equal value was put in another's place."""
        if any(self._empty):
            return True
        try:
            if self._forms_changed() or self._timed_changed() or self._live_changed():
                return True
            if (self._large and self._large_changed()) or not all(_alike(*pair) for pair in self._others):
                return True
        except Exception:  # values that cannot be compared were exchanged: identical ones are never asked
            return True
        for values, identities in self._tensors_of:
            if tuple(map(id, values.values())) != identities:
                return True
        return (
            any(values.get(name, _MISSING) is not kept for values, name, kept in self._items)
            or any(_attribute(value, name) is not kept for value, name, kept in self._attributes)
            or any(not _identical(read(value), kept) for value, read, kept in self._parts)
            or any(not _is_told(question(), kept) for question, kept in self._asked)
            or any(checksum(array) != kept for array, kept in self._arrays)
            or any(stamps([tensor]) != kept for tensor, kept in zip(self._tensors, self._stamps, strict=True))
        )

    def _forms_changed(self) -> bool:
        return (
            list(map(type, self._objects)) != self._classes
            or not all(map(is_, map(_dictionary_of, self._with_attributes), self._dictionaries))
            or any(
                value is not None and (type(value) is not kind or getattr(value, "__dict__", None) is not held)
                for value, kind, held in ((known(), kind, held) for known, kind, held in self._weak)
            )
        )

    def _live_changed(self) -> bool:
        # Comparing comes first: then as many are seen as there were.
        if self._live == self._kept and all(map(is_, chain.from_iterable(self._views), self._seen)):
            return False
        if not all(map(_alike, self._live, self._kept)):
            return True
        self._kept = list(map(_copied, self._live))
        self._seen = list(chain.from_iterable(self._views))  # exchanged for the like
        return False

    def _timed_changed(self) -> bool:
        if self._clock is None:
            return False
        reading = self._clock.read()
        if reading == self._reading:
            return False
        # A write to any dictionary that anybody has a watch on makes all of them be asked: cheaper than looking.
        versions = list(map(self._clock.version, self._timed_dicts))
        then: Sequence[int | None] = self._timed_versions or [None] * len(versions)
        for live, kept, now, before in zip(self._timed, self._timed_kept, versions, then, strict=True):
            if now != before and not _alike(live, kept):
                return True
        self._reading, self._timed_versions = reading, versions  # nothing was written to, or what was there before
        return False

    def changes(self) -> Iterator[Change | Reordered | Rewritten | Drawn]:
        """What was written since, place by place; slower than :meth:`changed`."""
        for place, live, kept, grows, owner in self._places:
            before = entries(kept)
            now = entries(live)
            if now.keys() != before.keys() or any(now[key] is not value for key, value in before.items()):
                yield Change(place, live, before, grows=grows, owner=owner)
            elif grows and isinstance(live, Mapping) and list(live) != list(before):
                yield Reordered(place, live, tuple(before))
        for place, (values, name, held) in zip(self._item_places, self._items, strict=True):
            if values.get(name, _MISSING) is not held:
                yield Change(place, values, _present(name, held), frozenset((name,)))
        for place, (value, name, held) in zip(self._attribute_places, self._attributes, strict=True):
            if _attribute(value, name) is not held:
                yield Change(place, value, _present(name, held), frozenset((name,)))
        for (place, before), (value, kept) in zip(self._array_places, self._arrays, strict=True):
            if checksum(value) != kept:
                yield Rewritten(place, value, before)
        for place, value, stamp in zip(self._tensor_places, self._tensors, self._stamps, strict=True):
            if stamps([value]) != stamp:
                yield Rewritten(place, value)

        for (place, put), (question, kept) in zip(self._asked_places, self._asked, strict=True):
            if not _is_told(now := question(), kept):
                yield Drawn(place, kept, now, put)

    def _large_changed(self) -> bool:
        assert dict_version is not None
        versions = list(map(dict_version, self._large))
        if versions == self._large_versions:
            return False
        if not all(map(_alike, self._large, self._large_kept)):
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
_dictionary_of: Callable[[Any], Any] = attrgetter("__dict__")


def _own_address(value: Tensor) -> int:
    try:
        return value.data_ptr()
    except RuntimeError:
        return id(value)


def _copied(value: Any) -> Any:
    return value.copy() if hasattr(value, "copy") else type(value)(value)


def _attribute(value: Any, name: str) -> Any:
    try:
        return getattr(value, name, _MISSING)
    except ValueError:  # an empty cell
        return _MISSING


def _is_told(now: Any, kept: Any) -> bool:
    return now is kept or (type(now) is type(kept) is str and now == kept)


def _present(name: str, held: Any) -> dict[str, Any]:
    return {} if held is _MISSING else {name: held}


def _identical(now: Mapping[Any, Any], kept: Mapping[Any, Any]) -> bool:
    return list(now) == list(kept) and all(_is_like(now[key], value) for key, value in kept.items())


def _views(value: Any, ordered: bool) -> list[Any] | None:
    """What shows of a container, whenever it is asked, more than comparing does; ``None`` if nothing does so in C."""
    if type(value) in (list, deque):
        return [] if all(map(_is_unequal_to_others, value)) else [value]
    if type(value) is MappingProxyType:
        return [value.values()]
    base = OrderedDict if isinstance(value, OrderedDict) else dict
    if (
        not isinstance(value, base)
        or type(value).values is not base.values
        or type(value).__iter__ is not base.__iter__
    ):
        return None
    # A single text has no order, and nothing else is equal to it.
    keys = [base.keys(value)] if ordered and (len(value) > 1 or not all(type(key) is str for key in value)) else []
    return keys if all(map(_is_unequal_to_others, value.values())) else [*keys, base.values(value)]


def _is_unequal_to_others(value: Any) -> bool:
    """Whether nothing but itself is equal to a value; comparing tensors of several elements is an error."""
    equal: Any = type(value).__eq__
    return equal is object.__eq__ or value is None or isinstance(value, Tensor)


def _alike(now: Any, kept: Any) -> bool:
    """Whether a container holds what it held, in the same order, or equal numbers and texts of the same types."""
    if isinstance(now, Set):
        return len(now) == len(kept) and (
            set(map(id, now)) == set(map(id, kept)) or sorted(map(_text, now)) == sorted(map(_text, kept))
        )
    if isinstance(now, Mapping):
        return len(now) == len(kept) and all(
            _is_like(*keys) and _is_like(now[keys[0]], kept[keys[1]]) for keys in zip(now, kept, strict=True)
        )
    return len(now) == len(kept) and all(map(_is_like, now, kept))


def _is_like(now: Any, kept: Any) -> bool:
    if now is kept:
        return True
    if type(now) is not type(kept):
        return False
    if type(now) in (float, complex):
        return repr(now) == repr(kept)  # zero has a sign, and NaN is none's equal
    if type(now) is tuple:
        return len(now) == len(kept) and all(map(_is_like, now, kept))
    return type(now) in _PLAIN and bool(now == kept)


_PLAIN = (bool, int, str, bytes, torch.dtype, torch.device, torch.Size)


def _text(value: Any) -> str:
    """What is the same of equal numbers and texts of one type only."""
    known = type(value) in (*_PLAIN, float, complex, type(None))
    return f"{type(value)} {value!r}" if known else f"{type(value)} {id(value)}"


def checksum(value: Any) -> int:
    """CRC of the contents of an array, a bytearray or whatever else shows its memory."""
    if isinstance(value, np.ndarray):
        return zlib.crc32(np.ascontiguousarray(value).view(np.uint8).reshape(-1).data) if value.size else 0
    with memoryview(value) as view:
        return zlib.crc32(view if view.contiguous else view.tobytes())
