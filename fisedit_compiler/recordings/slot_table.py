"""The recorded tensors of one call, and the table of their addresses that CUDA graphs read them through."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fisedit_compiler.kernels.addresses import address_table, is_plain

SlotLayout = Mapping[str, tuple[int, ...]]
"""Strides by slot name."""


class SlotTable(dict[str, Tensor]):
    """Slots by name. The table of addresses is made on first use and lives as long as the tensors it points to."""

    _addresses: tuple[SlotLayout, Tensor, dict[str, Tensor]] | None = None

    @classmethod
    def of(cls, slots: Mapping[str, Tensor]) -> SlotTable:
        """``slots`` itself if it is one already, the tensors it stands for if it is lazy."""
        if isinstance(slots, LazySlots):
            return slots.table()
        return slots if isinstance(slots, SlotTable) else cls(slots)

    def addresses(self, layout: SlotLayout, device: torch.device) -> Tensor:
        """int64 ``[len(layout)]`` on ``device``: where each slot begins, in the order of ``layout``.

        A slot of other strides than the layout's, or one that is not aligned, is copied once and the copy kept.
        """
        return self._laid_out(layout, device)[1]

    def laid_out(self, layout: SlotLayout, name: str) -> Tensor:
        """The slot, or the copy of it, whose address is in the table."""
        return self._laid_out(layout, self[name].device)[2][name]

    def _laid_out(self, layout: SlotLayout, device: torch.device) -> tuple[SlotLayout, Tensor, dict[str, Tensor]]:
        if self._addresses is None or self._addresses[0] is not layout:
            tensors = {name: _as_laid_out(self[name], strides) for name, strides in layout.items()}
            self._addresses = (layout, address_table(list(tensors.values()), device), tensors)
        return self._addresses


class LazySlots(Mapping[str, Tensor]):
    """Slots that are put together when they are read. What is read is a new tensor, and belongs to the reader."""

    @abstractmethod
    def table(self) -> SlotTable:
        """All slots as tensors. Whoever reads them by address keeps the table for as long."""


def slot_layout(slots: Mapping[str, Tensor], names: Sequence[str]) -> SlotLayout:
    """The strides of a call's slots, for others to follow."""
    return {name: slots[name].stride() for name in names}


def _as_laid_out(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    if tensor.stride() == strides and (is_plain(tensor) or not tensor.numel()):
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
