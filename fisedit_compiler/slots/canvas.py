"""A value in packed form, with all of its sites: ``[B, C, H, W]`` as ``[B, S, C]``; tokens as they are."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from fisedit_compiler.graph import ir
from fisedit_compiler.graph.specs import ValueSpec
from fisedit_compiler.slots.base import Slot, SlotKind, SlotNode
from fisedit_compiler.slots.registry import register_slot_kind

aten = torch.ops.aten


@register_slot_kind
class Canvas(SlotKind):
    """The packed value, which the sparse operation reads at sites that an edit leaves alone."""

    name: ClassVar[str] = "canvas"
    holds: ClassVar[Literal["value", "packed", "else", "derived"]] = "packed"

    def store(self, graph: fx.Graph, slot: Slot, value: fx.Node, other: SlotNode) -> fx.Node:
        order = slot.layout.packed
        if order.sides == 1:
            return value
        # [B, C, H, W] -> [B, H, W, C] -> [B, S, C], always a copy: the value may be the caller's own tensor.
        moved = ir.call(graph, aten.permute.default, (value, list(order.permutation)))
        copied = ir.call(graph, aten.clone.default, (moved,))
        copied.kwargs = {"memory_format": torch.contiguous_format}
        return ir.call(graph, aten.flatten.using_ints, (copied, order.site_dim, order.site_dim + 1))

    def problem(self, slot: Slot, value: ValueSpec, loaded: ValueSpec) -> str:
        site = slot.layout.site_dim()
        canvas = slot.layout.packed.spec(value)
        stored, found = (spec.shape[:site] + spec.shape[site + 1 :] for spec in (canvas, loaded))
        return "" if stored == found else f"loads {found} from slot {slot.name}, which stores {stored}"

    def batch_axes(self, slot: Slot, axis: int) -> tuple[int | None, int | None]:
        packed = slot.layout.packed_dim(axis)
        return packed, packed

    def recorded(self, slot: Slot, value: Tensor) -> Tensor:
        return slot.layout.packed.from_dense(value)
