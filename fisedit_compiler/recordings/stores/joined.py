"""The slots of a call that several stores hold: some as this call left them, others as an earlier one did."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from fisedit_compiler.recordings.stores.addresses import SlotAddresses, SlotLayout
from fisedit_compiler.recordings.stores.store import SlotStore, distinct_nbytes


class JoinedSlots(SlotStore):
    """A view of slots of several stores; it has nothing of its own and refers to no other such view."""

    def __init__(self, parts: Mapping[str, SlotStore]) -> None:
        """``parts`` says for every slot, in their order, which store has it."""
        self._parts: Mapping[str, SlotStore] = {
            name: part._parts[name] if isinstance(part, JoinedSlots) else part for name, part in parts.items()
        }

    @classmethod
    def of(cls, *stores: SlotStore) -> JoinedSlots:
        """All slots of some stores that have no slot in common."""
        return cls({name: store for store in stores for name in store})

    def read(self, name: str) -> Tensor:
        if name not in self._parts:
            raise self.missing(name)
        return self._parts[name].read(name)

    def addresses(self, layout: SlotLayout, device: torch.device) -> SlotAddresses:
        return SlotAddresses.of(self.read, layout, device)

    def prefetch(self, call: int) -> None:
        """Told to all of the stores."""
        for store in self._stores():
            store.prefetch(call)

    @property
    def nbytes(self) -> int:
        return distinct_nbytes(self.tensors())

    @property
    def own_nbytes(self) -> int:
        """Nothing: all of it is the stores'."""
        return 0

    def tensors(self) -> Iterator[Tensor]:
        for store in self._stores():
            yield from store.only(name for name, part in self._parts.items() if part is store).tensors()

    def only(self, names: Iterable[str]) -> JoinedSlots:
        """The same of these names, without what the stores have besides."""
        names = list(names)
        for name in names:
            if name not in self._parts:
                raise self.missing(name)
        kept: dict[str, SlotStore] = {}
        for store in self._stores():
            mine = [name for name in names if self._parts[name] is store]
            kept |= dict.fromkeys(mine, store.only(mine))
        return JoinedSlots({name: kept[name] for name in names})

    def _stores(self) -> list[SlotStore]:
        return list({id(store): store for store in self._parts.values()}.values())

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)
