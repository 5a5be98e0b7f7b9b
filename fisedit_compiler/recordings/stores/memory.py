"""Slots as tensors on the device that they were recorded on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from fisedit_compiler.recordings.stores.addresses import KnownAddresses, SlotAddresses, SlotLayout
from fisedit_compiler.recordings.stores.store import SlotStore, distinct_nbytes


class MemorySlots(SlotStore):
    """Tensors by name. What is read is the store's own tensor.

    The table of addresses, with the copies that a layout asks for, is made on first use and lives as long as the store.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        self._addresses = KnownAddresses()
        self._nbytes: int | None = None

    def read(self, name: str) -> Tensor:
        found = self._tensors.get(name)
        if found is None:
            raise self.missing(name)
        return found

    def addresses(self, layout: SlotLayout, device: torch.device) -> SlotAddresses:
        """The addresses; the same object again while the layout is one of the last two objects."""
        return self._addresses.of(layout, lambda: SlotAddresses.of(self.read, layout, device))

    def prefetch(self, call: int) -> None:
        """Everything is there already."""

    @property
    def nbytes(self) -> int:
        if self._nbytes is None:
            self._nbytes = distinct_nbytes(self._tensors.values())
        return self._nbytes

    @property
    def own_nbytes(self) -> int:
        """All of it."""
        return self.nbytes

    def tensors(self) -> Iterator[Tensor]:
        return iter(self._tensors.values())

    def only(self, names: Iterable[str]) -> MemorySlots:
        names = list(names)
        try:
            return MemorySlots(dict(zip(names, map(self._tensors.__getitem__, names), strict=True)))
        except KeyError as error:
            raise self.missing(error.args[0]) from None

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
