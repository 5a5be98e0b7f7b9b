"""Layouts: where the sites of a value are.

The lattice, from precise to vague: ``plain`` (no spatial axis), ``map``, ``tokens``, ``concat`` (text and image tokens
side by side on one axis), ``opaque`` (spatial but not site by site, with the reason). ``layout_rules.py`` infers them.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import sympy

from fisedit_compiler.graph.specs import ValueSpec

Kind = Literal["plain", "map", "tokens", "concat", "opaque"]
SITES = -1
"""Stands for the merged site axis in :meth:`Layout.packed_axes`."""


@dataclass(frozen=True)
class Layout:
    """Where the sites of a value are.

    Attributes:
        kind: see the module docstring.
        rank: number of dense axes.
        level: the level of the sites (1 is the spatial input's resolution, 2 is half of it).
        axes: ``(height axis, width axis)`` of a map, ``(token axis,)`` of tokens and concat.
        reason: why the value is opaque, in words a user can act on.
    """

    kind: Kind
    rank: int
    level: Fraction | None = None
    axes: tuple[int, ...] = ()
    reason: str = ""

    @property
    def is_rows(self) -> bool:
        """Whether the value has a packed form."""
        return self.kind in ("map", "tokens")

    def packed_axes(self) -> tuple[int, ...]:
        """Dense axis behind each axis of the packed form, :data:`SITES` for the site axis.

        Tokens keep their axis order. A map's sites become one axis right behind the leading (batch) axis, so that
        ``[B, C, H, W]`` packs to ``[B, N, C]``, channels last.
        """
        if self.kind == "tokens":
            return tuple(SITES if axis == self.axes[0] else axis for axis in range(self.rank))
        inner = [axis for axis in range(self.rank) if axis not in self.axes]
        leading = 1 if 0 in inner else 0
        return (*inner[:leading], SITES, *inner[leading:])

    def packed_dim(self, dim: int) -> int | None:
        """Position of dense axis ``dim`` in the packed form; ``None`` for a spatial axis."""
        dim %= self.rank
        if dim in self.axes:
            return None
        return self.packed_axes().index(dim)

    def site_dim(self) -> int:
        """Position of the site axis in the packed form."""
        return self.packed_axes().index(SITES)

    def __str__(self) -> str:
        if not self.is_rows:
            return self.kind + (f" ({self.reason})" if self.reason else "")
        return f"{self.kind}@{self.level}"


def opaque(rank: int, reason: str) -> Layout:
    return Layout("opaque", rank, reason=reason)


def packed_spec(spec: ValueSpec, layout: Layout, rows: sympy.Expr) -> ValueSpec:
    """Spec of the packed form: the site axis has ``rows`` entries."""
    return ValueSpec(tuple(rows if axis == SITES else spec.shape[axis] for axis in layout.packed_axes()), spec.dtype)
