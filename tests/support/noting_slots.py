"""A store of slots that notes what it is asked, for tests of those who ask."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fisedit_compiler import Recording
from fisedit_compiler.recordings.stores import SlotStore
from fisedit_compiler.recordings.stores.addresses import SlotAddresses, SlotLayout

Note = tuple[str, int]


@dataclass(eq=False)
class NotingSlots(SlotStore):
    """The slots of another store. ``notes`` has ``("announced", call)`` and ``("read", call)``, in order."""

    held: SlotStore
    call: int
    notes: list[Note] = field(default_factory=list)

    def read(self, name: str) -> Tensor:
        self.notes.append(("read", self.call))
        return self.held.read(name)

    def addresses(self, layout: SlotLayout, device: torch.device) -> SlotAddresses:
        self.notes.append(("read", self.call))
        return self.held.addresses(layout, device)

    def prefetch(self, call: int) -> None:
        self.notes.append(("announced", call))

    @property
    def nbytes(self) -> int:
        return self.held.nbytes

    @property
    def own_nbytes(self) -> int:
        return self.held.own_nbytes

    def tensors(self) -> Iterator[Tensor]:
        return self.held.tensors()

    def only(self, names: Iterable[str]) -> NotingSlots:
        return NotingSlots(self.held.only(names), self.call, self.notes)

    def __contains__(self, name: object) -> bool:
        return name in self.held

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


def noting(recording: Recording) -> tuple[Recording, list[Note]]:
    """The same recording in stores that note what they are asked, and their notes."""
    noted, notes = copy.copy(recording), list[Note]()
    noted.calls = [
        replace(call, slots=NotingSlots(call.slots, number, notes)) for number, call in enumerate(recording.calls)
    ]
    return noted, notes
