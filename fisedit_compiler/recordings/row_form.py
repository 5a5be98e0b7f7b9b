"""Where the rows of a slot lie in its value: how they are read from it and written to a copy of it."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from fisedit_compiler.graph.layout import SITES, Layout


@dataclass(frozen=True)
class RowForm:
    """Where the rows of a slot lie in its value.

    Attributes:
        level: whose sites they are.
        layout: of a value that is a map or tokens as the model has it; ``None`` for a packed one.
        dim: the site axis of the rows, and of a packed value.
    """

    level: Fraction
    dim: int
    layout: Layout | None = None

    @classmethod
    def dense(cls, layout: Layout) -> RowForm:
        """The form of a value that is not packed; height and width become one axis where the first of them is."""
        assert layout.is_rows and layout.level is not None, layout
        return cls(layout.level, flat_axes(layout).index(SITES), layout)

    def flat(self, value: Tensor) -> Tensor:
        """``value`` with one site axis, ``dim``."""
        if self.layout is None or self.layout.kind == "tokens":
            return value
        return value.permute(_adjacent(self.layout)).flatten(self.dim, self.dim + 1)

    def gather(self, value: Tensor, sites: Tensor) -> Tensor:
        """The rows of some sites of a value."""
        return self.flat(value).index_select(self.dim, sites)

    def write(self, value: Tensor, sites: Tensor, rows: Tensor) -> Tensor:
        """A copy of ``value`` whose rows of ``sites`` are ``rows``."""
        written = self.flat(value).index_copy(self.dim, sites, rows)
        if self.layout is None or self.layout.kind == "tokens":
            return written
        height, width = self.layout.axes
        written = torch.unflatten(written, self.dim, (value.shape[height], value.shape[width]))
        order = _adjacent(self.layout)
        return written.permute([order.index(axis) for axis in range(len(order))])


def flat_axes(layout: Layout) -> list[int]:
    """The axes of a dense value with one site axis: which dense axis each is, :data:`SITES` for the sites."""
    if layout.kind == "tokens":
        return [SITES if axis == layout.axes[0] else axis for axis in range(layout.rank)]
    axes = _adjacent(layout)
    start = axes.index(layout.axes[0])
    return [*axes[:start], SITES, *axes[start + 2 :]]


def _adjacent(layout: Layout) -> list[int]:
    """The order of axes in which a map's width follows its height: its own, or both behind the others."""
    height, width = layout.axes
    if width == height + 1:
        return list(range(layout.rank))
    return [*(axis for axis in range(layout.rank) if axis not in layout.axes), height, width]
