"""Mean and variance of the groups of a GroupNorm's input: float32 ``[B, G, 2]``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from fisedit_compiler.graph import ir
from fisedit_compiler.slots.base import Slot, SlotKind, SlotNode
from fisedit_compiler.slots.registry import register_slot_kind


@register_slot_kind
@dataclass(frozen=True)
class Statistics(SlotKind):
    """Statistics of a value ``[B, C, ...]``.

    Attributes:
        groups: of its channels.
        corrected: whether edits correct them (``norm="incremental"``); otherwise an edit of an edit goes on
            normalising by the base run's.
    """

    name: ClassVar[str] = "statistics"
    holds: ClassVar[Literal["value", "packed", "else", "derived"]] = "derived"
    groups: int
    corrected: bool

    def store(self, graph: fx.Graph, slot: Slot, value: fx.Node, other: SlotNode) -> fx.Node:
        return ir.call(graph, torch.ops.fisedit.group_norm_statistics.default, (value, self.groups))

    def batch_axes(self, slot: Slot, axis: int) -> tuple[int | None, int | None] | None:
        return (0, 0) if axis == 0 else None

    def recorded(self, slot: Slot, value: Tensor) -> Tensor:
        return statistics_of(value, self.groups)

    def edited(self, slot: Slot, base: Tensor, edited: Tensor) -> Tensor:
        return self.recorded(slot, edited if self.corrected else base)


def statistics_of(value: Tensor, groups: int) -> Tensor:
    """Mean and biased variance of ``[B, C, ...]`` over each group: float32 ``[B, groups, 2]``."""
    grouped = value.float().reshape(value.shape[0], groups, -1)
    return torch.stack([grouped.mean(dim=-1), grouped.var(dim=-1, correction=0)], dim=-1)
