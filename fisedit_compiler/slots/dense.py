"""A value as it is: what outputs, and operations that stay dense, read at sites that an edit leaves alone."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, fx

from fisedit_compiler.slots.base import Slot, SlotKind, SlotNode
from fisedit_compiler.slots.registry import register_slot_kind
from fisedit_compiler.slots.row_form import RowForm


@register_slot_kind
class Dense(SlotKind):
    """The dense value; exact, since outside the mask outputs are the recorded bits."""

    name: ClassVar[str] = "dense"
    holds: ClassVar[Literal["value", "packed", "else", "derived"]] = "value"

    def store(self, graph: fx.Graph, slot: Slot, value: fx.Node, other: SlotNode) -> fx.Node:
        return value

    def row_form(self, slot: Slot) -> RowForm:
        return RowForm.dense(slot.layout)

    def batch_axes(self, slot: Slot, axis: int) -> tuple[int | None, int | None]:
        return axis, slot.layout.flat.axes.index(axis)

    def recorded(self, slot: Slot, value: Tensor) -> Tensor:
        return value
