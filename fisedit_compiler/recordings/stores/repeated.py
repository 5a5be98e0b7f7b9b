"""The slots of a call as several edits in one batch read them: every recorded sample once for each edit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from fisedit_compiler.recordings.stores.addresses import SlotAddresses, SlotLayout
from fisedit_compiler.recordings.stores.store import SlotStore


class RepeatedSlots(SlotStore):
    """A view that repeats the samples of a slot when it is read, in place, and keeps nothing."""

    def __init__(
        self, base: SlotStore, samples: int, copies: int, axes: Callable[[], Mapping[str, int | None]]
    ) -> None:
        """A view.

        Args:
            base: the slots of the recorded call.
            samples: the recorded batch.
            copies: how often each sample is repeated.
            axes: gives the batch axis of every slot, when it is needed: ``None`` for what all samples share. Slots that
                it does not know, cross-attention maps, have it first.
        """
        self._base, self._samples, self._copies, self._axes = base, samples, copies, axes

    def read(self, name: str) -> Tensor:
        value, axis = self._base.read(name), self._axes().get(name, 0)
        return value if axis is None else repeat_samples(value, axis, self._samples, self._copies)

    def addresses(self, layout: SlotLayout, device: torch.device) -> SlotAddresses:
        return SlotAddresses.of(self.read, layout, device)

    def prefetch(self, call: int) -> None:
        """Told to the store of the recorded call."""
        self._base.prefetch(call)

    @property
    def nbytes(self) -> int:
        """Bytes of the recorded call's slots, not repeated."""
        return self._base.nbytes

    @property
    def own_nbytes(self) -> int:
        """Nothing: all of it is the recorded call's."""
        return 0

    def tensors(self) -> Iterator[Tensor]:
        return self._base.tensors()

    def only(self, names: Iterable[str]) -> RepeatedSlots:
        return RepeatedSlots(self._base.only(names), self._samples, self._copies, self._axes)

    def __contains__(self, name: object) -> bool:
        return name in self._base

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)


def repeat_samples(value: Tensor, axis: int, samples: int, copies: int) -> Tensor:
    """A tensor with every sample along ``axis`` repeated ``copies`` times in place, as a new tensor."""
    return torch.unflatten(value, axis, (samples, -1)).repeat_interleave(copies, axis).flatten(axis, axis + 1)
