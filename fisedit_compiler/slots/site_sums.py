"""What each site adds to the statistics of a GroupNorm's input: float32 ``[B, S, G, 2]``.

Sums are centred on the recorded mean, in the slot that ``slot.of`` names. Every edit moves that mean, also where it
writes nothing; so the root and each turn's rows stay centred on what they were measured about, and are centred anew
when they are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from fisedit_compiler.graph import ir
from fisedit_compiler.kernels.recentre_site_sums import recentre_site_sums
from fisedit_compiler.slots.base import Slot, SlotKind, SlotNode
from fisedit_compiler.slots.registry import register_slot_kind
from fisedit_compiler.slots.row_form import RowForm
from fisedit_compiler.slots.statistics import statistics_of
from fisedit_compiler.slots.turn import Edit
from fisedit_compiler.slots.written import Written, WrittenRows


@register_slot_kind
@dataclass(frozen=True)
class SiteSums(SlotKind):
    """Per site, the sums of ``x - mean`` and its square over a group's channels.

    Attributes:
        groups: of the value's channels.
        channels: of all groups together.
    """

    name: ClassVar[str] = "site_sums"
    holds: ClassVar[Literal["value", "packed", "else", "derived"]] = "derived"
    groups: int
    channels: int

    def store(self, graph: fx.Graph, slot: Slot, value: fx.Node, other: SlotNode) -> fx.Node:
        return ir.call(graph, torch.ops.fisedit.group_norm_site_sums.default, (value, other(slot.of), self.groups))

    def store_rows(self, graph: fx.Graph, slot: Slot, rows: fx.Node, other: SlotNode) -> fx.Node:
        """Of rows ``[B, N, C]``, about the mean that the edit read and corrects."""
        return ir.call(graph, torch.ops.fisedit.group_norm_row_sums.default, (rows, other(slot.of)))

    def row_form(self, slot: Slot) -> RowForm:
        assert slot.layout.level is not None
        return RowForm(slot.layout.level, 1)

    def written(self, slot: Slot, before: Written | None, edit: Edit) -> Written:
        centre, target = edit.base[slot.of], edit.updates[slot.of]
        rows = CentredRows(edit.turn, edit.updates[slot.name], centre)
        if before is None:
            return WrittenSums(slot.form, (rows,), centre, target, self.channels)
        assert isinstance(before, WrittenSums), "rows of site sums are never written without their centre"
        return before.centred_on(target).after(rows)

    def batch_axes(self, slot: Slot, axis: int) -> tuple[int | None, int | None] | None:
        return (0, 0) if axis == 0 else None

    def recorded(self, slot: Slot, value: Tensor) -> Tensor:
        batch, channels = value.shape[:2]
        mean = statistics_of(value, self.groups)[:, :, 0, None, None]
        centred = value.float().reshape(batch, self.groups, channels // self.groups, -1) - mean
        return torch.stack([centred.sum(dim=2), centred.square().sum(dim=2)], dim=-1).transpose(1, 2)


@dataclass(slots=True, eq=False)
class CentredRows(WrittenRows):
    """Rows of site sums.

    Attributes:
        centre: the statistics they are centred on.
    """

    centre: Tensor


@dataclass(slots=True, eq=False)
class WrittenSums(Written):
    """What edits wrote of site sums.

    Attributes:
        centre: statistics that the root is centred on, float32 ``[B, G, 2]``.
        target: statistics to centre on.
        channels: of all groups together.
    """

    centre: Tensor
    target: Tensor
    channels: int

    def over(self, root: Tensor) -> Tensor:
        """The sums float32 ``[B, S, G, 2]`` about the mean of ``target``."""
        rows = [self._about_target(written.rows, written.centre) for written in self._centred()]
        return self._written(self._about_target(root, self.centre), rows)

    def centred_on(self, target: Tensor) -> WrittenSums:
        """The same about another mean."""
        return replace(self, target=target)

    def tensors(self) -> Iterator[Tensor]:
        """Everything that is kept alive to read it besides the root, the small centres included."""
        yield from Written.tensors(self)
        yield self.centre
        yield self.target
        yield from (written.centre for written in self._centred())

    def _centred(self) -> Iterator[CentredRows]:
        for written in self.by_turn:
            assert isinstance(written, CentredRows), "rows of site sums know what they are centred on"
            yield written

    def _about_target(self, sums: Tensor, centre: Tensor) -> Tensor:
        return sums if centre is self.target else recentre_site_sums(sums, centre, self.target, self.channels)
