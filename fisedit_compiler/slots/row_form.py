"""Where the rows of a slot lie in its value: how they are read from it and written to a copy of it."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor

from fisedit_compiler.graph.layout import Layout
from fisedit_compiler.graph.site_order import put_rows


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
        assert layout.level is not None, layout
        return cls(layout.level, layout.flat.site_dim, layout)

    def gather(self, value: Tensor, sites: Tensor) -> Tensor:
        """The rows of some sites of a value."""
        return value.index_select(self.dim, sites) if self.layout is None else self.layout.flat.gather(value, sites)

    def write(self, value: Tensor, sites: Tensor, rows: Tensor) -> Tensor:
        """A copy of ``value`` whose rows of ``sites`` are ``rows``."""
        if self.layout is None:
            return put_rows(value, self.dim, sites, rows)
        return self.layout.flat.write(value, sites, rows)
