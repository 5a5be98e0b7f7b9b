"""What a forward only writes: a shape it notes, a counter it keeps, a list that it fills.

A note names a place as the reader of the structure came by it, so that it means the same at every reading. It may be on
the module itself, on an object, in a list or among globals; a forward that also reads it is refused by the self-check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, MutableSequence, MutableSet, Set
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


@dataclass(frozen=True)
class Only:
    """Stands for all keys of a container but some: those that were there before the forward added to it."""

    keys: frozenset[Any]


Note = tuple[str, Any]
"""A place and what of it is left out: an attribute, a key, an index, or all but some of them (:class:`Only`)."""

CONTENTS = "contents"
"""In the place of a key: what the numbers of an array are."""


class _Order:
    pass


ORDER = _Order()
"""In the place of a key: which of a dictionary's keys comes first."""


@dataclass(frozen=True)
class Change:
    """A place that holds something else than it did.

    Attributes:
        place: its name.
        live: the dictionary, list or set itself, or an object with the attributes in ``before``.
        before: what was in it, by key, index or element.
        keys: which of them are the forward's to read; all if ``None``.
        grows: whether what is added later is left out with what was added now; not so for attributes and globals.
        owner: the class, if these are its attributes.
    """

    place: str
    live: Any
    before: Mapping[Any, Any]
    keys: frozenset[str] | None = None
    grows: bool = False
    owner: type | None = None

    @property
    def now(self) -> dict[Any, Any]:
        if not isinstance(self.live, _CONTAINERS):
            return _attributes(self.live, self.keys or ())
        now = entries(self.live)
        return now if self.keys is None else {key: now[key] for key in self.keys & now.keys()}

    def written(self) -> list[Any]:
        """What was written here: attributes, keys or indices."""
        now, missing = self.now, object()
        return [key for key in {**self.before, **now} if now.get(key, missing) is not self.before.get(key, missing)]

    def notes(self, kept: Set[Note] = frozenset()) -> Iterable[Note]:
        """What was written here, to be left out; not what is in ``kept``."""
        now, written = self.now, [key for key in self.written() if (self.place, key) not in kept]
        if self.grows and not self.before.keys() >= now.keys() & set(written):
            yield self.place, Only(frozenset(now.keys() - written))
        else:
            yield from ((self.place, key) for key in written)

    def undo(self, *, everything: bool) -> None:
        """Put back what was there: ``everything``, or only where sizes and tensors of a capture were left."""
        now = self.now
        keys = [key for key in {**self.before, **now} if everything or is_of_a_capture((key, now.get(key)))]
        if not keys:
            return
        if isinstance(self.live, MutableSequence):
            self.live.clear()
            self.live.extend(self.before.values())
            return
        for key in keys:
            if key in self.before:
                self.put(key, self.before[key])
            else:
                self._take_out(key)

    def put(self, key: Any, value: Any) -> None:
        """Write to the place; an element of a set is put in as it is."""
        if isinstance(self.live, MutableSet):
            self.live.add(key)
        elif isinstance(self.live, (MutableMapping, MutableSequence)):
            self.live[key] = value
        elif not isinstance(self.live, _CONTAINERS) or self.owner is not None:
            with suppress(AttributeError, TypeError):
                setattr(self._object, key, value)

    def _take_out(self, key: Any) -> None:
        if isinstance(self.live, MutableSet):
            self.live.discard(key)
        elif isinstance(self.live, MutableMapping):
            self.live.pop(key, None)
        elif not isinstance(self.live, _CONTAINERS) or self.owner is not None:
            with suppress(AttributeError, TypeError):
                delattr(self._object, key)

    @property
    def _object(self) -> Any:
        return self.live if self.owner is None else self.owner


@dataclass(frozen=True)
class Reordered:
    """A dictionary that holds what it did in another order, as the last used first."""

    place: str
    live: Any
    before: tuple[Any, ...]

    def notes(self, kept: Set[Note] = frozenset()) -> Iterable[Note]:
        yield self.place, ORDER

    def undo(self, *, everything: bool) -> None:
        if everything and isinstance(self.live, MutableMapping):
            for key in [key for key in self.before if key in self.live]:
                self.live[key] = self.live.pop(key)


@dataclass(frozen=True)
class Rewritten:
    """Numbers in memory that are others than they were; ``before`` is ``None`` where they are too many to keep."""

    place: str
    live: Any
    before: Any = None

    def notes(self, kept: Set[Note] = frozenset()) -> Iterable[Note]:
        yield self.place, CONTENTS

    def undo(self, *, everything: bool) -> None:
        if everything and self.before is not None:
            self.live[:] = self.before


@dataclass(frozen=True)
class Drawn:
    """A state that only a call tells and that is another now: of an iterator, of random numbers, a context variable's.

    Attributes:
        put: writes a state back; ``None`` where that is not possible.
    """

    place: str
    before: Any
    now: Any
    put: Callable[[Any], object] | None = None

    def notes(self, kept: Set[Note] = frozenset()) -> Iterable[Note]:
        yield self.place, CONTENTS

    def undo(self, *, everything: bool) -> None:
        if self.put is not None and (everything or is_of_a_capture(self.now)):
            self.put(self.before)


_CONTAINERS = (Mapping, MutableSequence, Set)


def entries(value: Any) -> dict[Any, Any]:
    """What is in a container, by key, index or element."""
    if isinstance(value, Mapping):
        return dict(value)
    return dict(enumerate(value)) if isinstance(value, MutableSequence) else dict.fromkeys(value)


def _attributes(value: Any, names: Iterable[str]) -> dict[str, Any]:
    """Slots of an object, or the contents of a cell, as far as there is something in them."""
    found: dict[str, Any] = {}
    for name in names:
        with suppress(AttributeError, ValueError):
            found[name] = getattr(value, name)
    return found


def is_of_a_capture(value: Any, depth: int = 4) -> bool:
    """Whether a value means something inside of a capture only, or holds something that does."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, FakeTensor, torch.fx.Proxy)):
        return True
    if isinstance(value, Tensor) or depth == 0:
        return False
    if isinstance(value, Mapping):
        value = (*value, *value.values())
    return isinstance(value, (tuple, list, set)) and any(is_of_a_capture(item, depth - 1) for item in value)


def describe(note: Note) -> str:
    """A note as the user would write it: ``mid_block.count``, ``history[0]``."""
    place, key = note
    if isinstance(key, (Only, _Order)) or key == CONTENTS:
        return place.strip(". ")
    return (
        f"{place}.{key}".strip(". ") if isinstance(key, str) and key.isidentifier() else f"{place}[{key!r}]".strip(". ")
    )


class Notes:
    """What is left out of a reading, by place."""

    def __init__(self, notes: Iterable[Note] = ()) -> None:
        self._by_place: dict[str, list[Any]] = {}
        for place, key in notes:
            self._by_place.setdefault(place, []).append(key)

    def __contains__(self, place: str) -> bool:
        return place in self._by_place

    def __bool__(self) -> bool:
        return bool(self._by_place)

    def part(self, place: str, value: Any) -> dict[Any, Any]:
        """What is read of a container: its entries, without those that the forward only writes."""
        noted = self._by_place.get(place, [])
        names = [key for key in noted if not isinstance(key, Only)]
        found = {key: held for key, held in entries(value).items() if key not in names}
        for only in [key for key in noted if isinstance(key, Only)]:
            found = {key: held for key, held in found.items() if key in only.keys}
        if ORDER in noted:
            found = dict(sorted(found.items(), key=lambda item: repr(item[0])))
        return found

    def leaves_out(self, place: str, key: Any) -> bool:
        return key in self._by_place.get(place, ())

    def cover(self, change: Change | Reordered | Rewritten | Drawn) -> bool:
        """Whether all that was written there is left out already."""
        if isinstance(change, Reordered):
            return self.leaves_out(change.place, ORDER)
        if not isinstance(change, Change):
            return self.leaves_out(change.place, CONTENTS)
        noted = self._by_place.get(change.place, ())
        some = [only.keys for only in noted if isinstance(only, Only)]
        return all(key in noted or any(key not in keys for keys in some) for key in change.written())
