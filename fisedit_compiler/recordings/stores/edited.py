"""The slots of an edited call as a copy-on-write view: what edits wrote, over the recording that they left alone.

An edit writes the active rows of canvases and small values such as statistics. A view keeps these and shares all
other slots with the recording that was edited. A slot that was written to is put together when somebody reads it, and
the result is not kept. A view of a view is a view of the same recording: views do not refer to each other, so
dropping a recording frees exactly what no other one needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from fisedit_compiler.recordings.stores.addresses import SlotAddresses, SlotLayout
from fisedit_compiler.recordings.stores.joined import JoinedSlots
from fisedit_compiler.recordings.stores.store import SlotStore, distinct_nbytes
from fisedit_compiler.slots.written import Written

Change = Tensor | Written
"""What an edit made of a slot: another value, or rows over its value, those of earlier edits included."""
Value = TypeVar("Value", Tensor, Written)


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
            root, whole, rows = base._root, base._whole, base._rows
        names = dict.fromkeys(base if names is None else names)
        values = {name: change for name, change in changes.items() if isinstance(change, Tensor)}
        written = {name: change for name, change in changes.items() if isinstance(change, Written)}
        self._changes = (values, written)
        self._hold(
            names,
            root,
            _of({**whole, **values}, names),
            _of({**{name: change for name, change in rows.items() if name not in values}, **written}, names),
        )

    def _hold(
        self, names: dict[str, None], root: SlotStore, whole: dict[str, Tensor], rows: dict[str, Written]
    ) -> None:
        self._names, self._whole, self._rows = names, whole, rows
        needed = names.keys() - whole.keys() if whole else names.keys()
        if root.keys() != needed:
            root = root.only([name for name in names if name in needed])
        self._root = root
        self._addresses: tuple[SlotLayout, SlotAddresses] | None = None

    @property
    def own(self) -> tuple[Tensor, ...]:
        """The tensors that the last edit added, each once."""
        values, written = self._changes
        added = [*values.values(), *(change.by_turn[-1].rows for change in written.values())]
        return tuple({(tensor.data_ptr(), tensor.nbytes): tensor for tensor in added}.values())

    def read(self, name: str) -> Tensor:
        """The slot: a new tensor, which belongs to the reader, if edits wrote rows of it."""
        if name not in self._names:
            raise self.missing(name)
        value = self._whole[name] if name in self._whole else self._root.read(name)
        return self._rows[name].over(value) if name in self._rows else value

    def addresses(self, layout: SlotLayout, device: torch.device) -> SlotAddresses:
        """The addresses; kept, as :class:`MemorySlots` keeps its own, if no slot had to be put together for them."""
        if self._rows:
            return SlotAddresses.of(self.read, layout, device)
        known = self._addresses  # looked at once: several runs may read a recording
        if known is None or known[0] is not layout:
            known = self._addresses = (layout, SlotAddresses.of(self.read, layout, device))
        return known[1]

    def prefetch(self, call: int) -> None:
        """Told to the store of the root: what edits wrote is in memory."""
        self._root.prefetch(call)

    @property
    def nbytes(self) -> int:
        return self._root.nbytes + distinct_nbytes(self._written())

    @property
    def own_nbytes(self) -> int:
        """Bytes that the last edit added. A turn's index tables, shared by all its slots and calls, do not count."""
        return sum(tensor.nbytes for tensor in self.own)

    def tensors(self) -> Iterator[Tensor]:
        yield from self._root.tensors()
        yield from self._written()

    def only(self, names: Iterable[str]) -> EditedSlots:
        """A view of the same slots, of these names only; it has nothing of its own."""
        names = list(names)
        for name in names:
            if name not in self._names:
                raise self.missing(name)
        return EditedSlots(self, {}, names)

    def with_earlier(self, earlier: EditedSlots, names: Iterable[str]) -> EditedSlots:
        """The same, but slots of these names are those of another call of the edit, which stay shared with it."""
        then = earlier.only(name for name in names if name in self._names)
        now = self.only(name for name in self._names if name not in then._names)
        joined = EditedSlots(self, {}, ())
        joined._changes = self._changes
        joined._hold(
            self._names,
            JoinedSlots.of(then._root, now._root),
            {**then._whole, **now._whole},
            {**then._rows, **now._rows},
        )
        return joined

    @property
    def written(self) -> Mapping[str, Written]:
        """The slots that edits wrote rows of."""
        return self._rows

    def _written(self) -> Iterator[Tensor]:
        yield from self._whole.values()
        for change in self._rows.values():
            yield from change.tensors()

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _of(values: dict[str, Value], names: dict[str, None]) -> dict[str, Value]:
    """Those of these names."""
    return values if values.keys() <= names.keys() else {name: values[name] for name in values if name in names}


def written_in(slots: SlotStore) -> Mapping[str, Written]:
    """What edits wrote rows of, by slot: of a recorded run nothing."""
    return slots.written if isinstance(slots, EditedSlots) else {}
