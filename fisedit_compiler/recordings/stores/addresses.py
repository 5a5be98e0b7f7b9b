"""Where slots lie in memory: the table of their addresses that CUDA graphs read them through."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisedit_compiler.kernels.addresses import address_table, is_plain

SlotLayout = Mapping[str, tuple[int, ...]]
"""Strides by slot name."""


@dataclass(frozen=True, eq=False)
class SlotAddresses:
    """A table of addresses, and what it points to.

    Attributes:
        table: int64 ``[slots]`` on the device that reads it: where each slot begins, in the order of the layout.
        tensors: the slots, or the copies of them, whose addresses are in the table. The table is good for as long as
            they are held.
    """

    table: Tensor
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, read: Callable[[str], Tensor], layout: SlotLayout, device: torch.device) -> SlotAddresses:
        """The addresses of slots that ``read`` gives. One of other strides, or that is not aligned, is copied."""
        tensors = {name: _as_laid_out(read(name), strides) for name, strides in layout.items()}
        return cls(address_table(list(tensors.values()), device), tensors)


class KnownAddresses:
    """The addresses of one store by the layouts that were asked for last: full calls and shallow ones have their own.

    Several runs may ask at once.
    """

    def __init__(self, kept: int = 2) -> None:
        self._most = kept
        self._kept: tuple[tuple[SlotLayout, SlotAddresses], ...] = ()

    def of(self, layout: SlotLayout, make: Callable[[], SlotAddresses]) -> SlotAddresses:
        """Those of a layout; the same object again while the layout is the same object."""
        kept = self._kept
        for known, addresses in kept:
            if known is layout:
                return addresses
        made = make()
        self._kept = ((layout, made), *kept[: self._most - 1])
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, maybe in another process, has its slots elsewhere: it knows no addresses."""
        return KnownAddresses, (self._most,)


def _as_laid_out(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    if tensor.stride() == strides and (is_plain(tensor) or not tensor.numel()):
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
