"""The slots of an edited call as a copy-on-write view: what edits wrote, over the recording that they left alone.

An edit writes the active rows of canvases and small values such as statistics. A view keeps these and shares all
other slots with the recording that was edited. A slot that was written to is put together when somebody reads it, and
the result is not kept. A view of a view is a view of the same recording: views do not refer to each other, so
dropping a recording frees exactly what no other one needs.

Writing down what an edit changed takes longer than a call on a GPU does. So a view may be made later: when it is first
asked for something, or when the recording that was edited is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fisedit_compiler.recordings.stores.addresses import KnownAddresses, SlotAddresses, SlotLayout
from fisedit_compiler.recordings.stores.joined import JoinedSlots
from fisedit_compiler.recordings.stores.store import SlotStore, distinct_nbytes
from fisedit_compiler.slots.written import Written, WrittenRows

Change = Tensor | Written
"""What an edit made of a slot: another value, or rows over its value, those of earlier edits included."""
Value = TypeVar("Value", Tensor, Written)


@dataclass(slots=True, eq=False)
class _Contents:
    """What a view consists of.

    Attributes:
        names: of its slots.
        root: has those that no edit wrote whole.
        whole: values that an edit wrote whole.
        rows: what edits wrote over either.
        values: of ``whole``, what the last edit wrote.
        written: of ``rows``, likewise.
    """

    names: dict[str, None]
    root: SlotStore
    whole: dict[str, Tensor]
    rows: dict[str, Written]
    values: dict[str, Tensor]
    written: dict[str, Written]

    def __post_init__(self) -> None:
        needed = self.names.keys() - self.whole.keys() if self.whole else self.names.keys()
        if self.root.keys() != needed:
            self.root = self.root.only([name for name in self.names if name in needed])


class EditedSlots(SlotStore):
    """The slots of a call, with what edits changed of them.

    A slot is the root's, or a value that an edit wrote whole; over either lie the rows that later edits wrote.
    """

    def __init__(self, base: SlotStore, changes: Mapping[str, Change], names: Iterable[str] | None = None) -> None:
        """A view.

        Args:
            base: slots of the edited call, which may be such a view itself.
            changes: what the edit changed.
            names: the slots to have, each in ``changes`` or the base; by default the base's.
        """
        root: SlotStore = base
        whole: dict[str, Tensor] = {}
        rows: dict[str, Written] = {}
        if isinstance(base, EditedSlots):
            then = base._contents
            root, whole, rows = then.root, then.whole, then.rows
        values = {name: change for name, change in changes.items() if isinstance(change, Tensor)}
        written = {name: change for name, change in changes.items() if isinstance(change, Written)}
        lasting = {name: change for name, change in rows.items() if name not in values}
        kept = dict.fromkeys(base if names is None else names)
        self._hold(
            _Contents(kept, root, _of({**whole, **values}, kept), _of({**lasting, **written}, kept), values, written)
        )

    def _hold(self, contents: _Contents | None) -> None:
        self._known = contents
        self._make: Callable[[], EditedSlots] | None = None
        self._own_nbytes: int | None = None
        self._addresses = KnownAddresses()

    @classmethod
    def later(cls, make: Callable[[], EditedSlots], own_nbytes: int) -> EditedSlots:
        """What ``make`` gives, which is called when the view is first asked for a slot or for :meth:`settle`.

        Until then everything is kept that ``make`` refers to.

        Args:
            make: makes the view; any thread may call it, and two may at once.
            own_nbytes: bytes that the edit adds.
        """
        view = cls.__new__(cls)
        view._hold(None)
        view._make, view._own_nbytes = make, own_nbytes
        return view

    def settle(self) -> None:
        """Refer to what is needed only."""
        _ = self._contents

    def __getstate__(self) -> dict[str, Any]:
        """What is copied or pickled: the slots, not how they are made, and each in memory of its own.

        What one call of an edit wrote shares pieces of memory; pickle writes the whole piece for every tensor in it.
        """
        known: dict[int, Any] = {}
        parts = {item.name: _apart(getattr(self._contents, item.name), known) for item in fields(_Contents)}
        return {**vars(self), "_known": _Contents(**parts)}

    @property
    def _contents(self) -> _Contents:
        contents, make = self._known, self._make
        if contents is None:
            # Whoever settled it meanwhile noted the contents before forgetting how they are made.
            contents = self._known if make is None else make()._contents
            assert contents is not None
            self._known = contents
            self._make = None
        return contents

    @property
    def own(self) -> tuple[Tensor, ...]:
        """The tensors that the last edit added, each once."""
        contents = self._contents
        added = [*contents.values.values(), *(change.by_turn[-1].rows for change in contents.written.values())]
        return tuple({(tensor.data_ptr(), tensor.nbytes): tensor for tensor in added}.values())

    def read(self, name: str) -> Tensor:
        """The slot: a new tensor, which belongs to the reader, if edits wrote rows of it."""
        contents = self._contents
        if name not in contents.names:
            raise self.missing(name)
        value = contents.whole[name] if name in contents.whole else contents.root.read(name)
        return contents.rows[name].over(value) if name in contents.rows else value

    def addresses(self, layout: SlotLayout, device: torch.device) -> SlotAddresses:
        """The addresses; kept, as :class:`MemorySlots` keeps its own, if no slot had to be put together for them."""
        if self._contents.rows:
            return SlotAddresses.of(self.read, layout, device)
        return self._addresses.of(layout, lambda: SlotAddresses.of(self.read, layout, device))

    def prefetch(self, call: int) -> None:
        """Told to the store of the root: what edits wrote is in memory."""
        self._contents.root.prefetch(call)

    @property
    def nbytes(self) -> int:
        return self._contents.root.nbytes + distinct_nbytes(self._written())

    @property
    def own_nbytes(self) -> int:
        """Bytes that the last edit added. A turn's index tables, shared by all its slots and calls, do not count."""
        if self._own_nbytes is None:
            self._own_nbytes = sum(tensor.nbytes for tensor in self.own)
        return self._own_nbytes

    def tensors(self) -> Iterator[Tensor]:
        yield from self._contents.root.tensors()
        yield from self._written()

    def only(self, names: Iterable[str]) -> EditedSlots:
        """A view of the same slots, of these names only; it has nothing of its own."""
        names = list(names)
        for name in names:
            if name not in self._contents.names:
                raise self.missing(name)
        return EditedSlots(self, {}, names)

    def with_earlier(self, earlier: EditedSlots, names: Iterable[str]) -> EditedSlots:
        """The same, but slots of these names are those of another call of the edit, which stay shared with it."""
        mine = self._contents
        then = earlier.only(name for name in names if name in mine.names)._contents
        now = self.only(name for name in mine.names if name not in then.names)._contents
        joined = EditedSlots.__new__(EditedSlots)
        joined._hold(
            _Contents(
                mine.names,
                JoinedSlots.of(then.root, now.root),
                {**then.whole, **now.whole},
                {**then.rows, **now.rows},
                mine.values,
                mine.written,
            )
        )
        return joined

    @property
    def written(self) -> Mapping[str, Written]:
        """The slots that edits wrote rows of."""
        return self._contents.rows

    def _written(self) -> Iterator[Tensor]:
        contents = self._contents
        yield from contents.whole.values()
        for change in contents.rows.values():
            yield from change.tensors()

    def __contains__(self, name: object) -> bool:
        return name in self._contents.names

    def __iter__(self) -> Iterator[str]:
        return iter(self._contents.names)

    def __len__(self) -> int:
        return len(self._contents.names)


def _of(values: dict[str, Value], names: dict[str, None]) -> dict[str, Value]:
    """Those of these names."""
    return values if values.keys() <= names.keys() else {name: values[name] for name in values if name in names}


def _apart(value: Any, known: dict[int, Any]) -> Any:
    """The same with a copy of every tensor that shares its memory; ``known`` are those that were made, by identity."""
    if isinstance(value, dict):
        return {name: _apart(item, known) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_apart(item, known) for item in value)
    if id(value) not in known:
        made = value
        if isinstance(value, Tensor) and value.untyped_storage().nbytes() != value.nbytes:
            made = value.clone()  # of a dense tensor: its strides stay
        elif isinstance(value, (Written, WrittenRows)):
            made = replace(value, **{item.name: _apart(getattr(value, item.name), known) for item in fields(value)})
        known[id(value)] = made
    return known[id(value)]


def written_in(slots: SlotStore) -> Mapping[str, Written]:
    """What edits wrote rows of, by slot: of a recorded run nothing."""
    return slots.written if isinstance(slots, EditedSlots) else {}
