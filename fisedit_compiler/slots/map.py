"""Cross-attention maps ``[B, heads, S, T]``: how much every site attends to every token.

They are recorded on request, beside the program's own slots; ``passes/programs/maps.py`` makes the nodes they are
stored from and the graphs that read them.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, fx

from fisedit_compiler.slots.base import Slot, SlotKind, SlotNode
from fisedit_compiler.slots.registry import register_slot_kind


@register_slot_kind
class Map(SlotKind):
    """The map as it is."""

    name: ClassVar[str] = "map"
    holds: ClassVar[Literal["value", "packed", "else", "derived"]] = "derived"

    def store(self, graph: fx.Graph, slot: Slot, value: fx.Node, other: SlotNode) -> fx.Node:
        return value

    def batch_axes(self, slot: Slot, axis: int) -> tuple[int | None, int | None] | None:
        return (0, 0) if axis == 0 else None

    def recorded(self, slot: Slot, value: Tensor) -> Tensor:
        return value
