"""Layouts: the role of every axis of a value, and with them where its sites are.

The lattice, from precise to vague, is read from the roles: ``plain`` (no spatial axis), ``map`` (height and width),
``tokens`` (all sites on one axis), ``concat`` (text and image tokens side by side on one axis), ``opaque`` (spatial but
not site by site, with the reason). ``layout_rules.py`` infers layouts.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Literal

from torch import Tensor

from fisedit_compiler.errors import LayoutError
from fisedit_compiler.graph.axis_roles import Batch, Channel, Joined, Role, Sites, Unknown
from fisedit_compiler.graph.site_order import SiteOrder
from fisedit_compiler.graph.sizes import row_symbol
from fisedit_compiler.graph.specs import ValueSpec

Kind = Literal["plain", "map", "tokens", "concat", "opaque"]


@dataclass(frozen=True)
class Layout:
    """The roles of a value's axes.

    Attributes:
        roles: one for each dense axis.
        reason: why the value is concat or opaque, in words a user can act on.

    Raises:
        LayoutError: the roles are those of no value: sites of two levels, a height without a width, an unknown role
            without a reason.
    """

    roles: tuple[Role, ...]
    reason: str = ""

    def __post_init__(self) -> None:
        spatial = [role for role in self.roles if isinstance(role, (Sites, Joined))]
        sides = sorted(role.side if isinstance(role, Sites) else "joined" for role in spatial)
        levels = {role.level for role in spatial if isinstance(role, Sites)}
        if sides not in ([], ["both"], ["height", "width"], ["joined"]) or len(levels) > 1:
            raise LayoutError(
                f"No value has axes {', '.join(map(str, spatial))}: sites are one axis, or the height and the width "
                "of one level. A value that relates sites to sites is opaque(rank, reason)."
            )
        vague = any(isinstance(role, (Joined, Unknown)) for role in self.roles)
        if (vague and not self.reason) or (self.reason and levels):
            raise LayoutError(f"{self.roles}: a concat or opaque value has a reason to show, others have none.")

    @property
    def rank(self) -> int:
        """Number of dense axes."""
        return len(self.roles)

    @cached_property
    def kind(self) -> Kind:
        """The place in the lattice, see the module docstring."""
        if any(isinstance(role, Joined) for role in self.roles):
            return "concat"
        if self.reason:
            return "opaque"
        kinds: tuple[Kind, ...] = ("plain", "tokens", "map")
        return kinds[len(self.axes)]

    @cached_property
    def axes(self) -> tuple[int, ...]:
        """``(height axis, width axis)`` of a map, ``(token axis,)`` of tokens and concat."""
        found = {
            role.side if isinstance(role, Sites) else "joined": axis
            for axis, role in enumerate(self.roles)
            if isinstance(role, (Sites, Joined))
        }
        return tuple(found[side] for side in ("height", "width", "both", "joined") if side in found)

    @cached_property
    def level(self) -> Fraction | None:
        """The level of the sites."""
        return next((role.level for role in self.roles if isinstance(role, Sites)), None)

    @property
    def is_rows(self) -> bool:
        """Whether the value has a packed form."""
        return self.kind in ("map", "tokens")

    def has_sites_of(self, other: Layout) -> bool:
        """Whether both have the same sites on the same axes, whatever their other axes are."""
        mine = (self.kind, self.rank, self.level, self.axes, self.reason)
        return mine == (other.kind, other.rank, other.level, other.axes, other.reason)

    # -- dense and packed ------------------------------------------------------------------------

    @cached_property
    def packed(self) -> SiteOrder:
        """The order of rows and canvases.

        Tokens keep their axis order. A map's sites become one axis right behind the first axis, so that
        ``[B, C, H, W]`` packs to ``[B, N, C]``, channels last.
        """
        if self.kind == "tokens":
            return self.flat
        others = self._others()
        leading = 1 if 0 in others else 0
        return SiteOrder((*others[:leading], *self.axes, *others[leading:]), leading, 2)

    @cached_property
    def flat(self) -> SiteOrder:
        """The order that is reached with the least moving: a width behind its height stays where it is."""
        assert self.is_rows, self
        site, *_ = self.axes
        if self.axes[-1] == site + len(self.axes) - 1:
            return SiteOrder(tuple(range(self.rank)), site, len(self.axes))
        others = self._others()
        return SiteOrder((*others, *self.axes), len(others), 2)

    def _others(self) -> list[int]:
        return [axis for axis in range(self.rank) if axis not in self.axes]

    def packed_axes(self) -> tuple[int, ...]:
        """Dense axis behind each axis of the packed form, ``SITES`` for the site axis."""
        return self.packed.axes

    def packed_dim(self, dim: int) -> int | None:
        """Position of dense axis ``dim`` in the packed form; ``None`` for a spatial axis."""
        dim %= self.rank
        return None if dim in self.axes else self.packed.axes.index(dim)

    def site_dim(self) -> int:
        """Position of the site axis in the packed form."""
        return self.packed.site_dim

    def row_spec(self, spec: ValueSpec) -> ValueSpec:
        """Spec of the rows of the active sites of a dense value."""
        assert self.level is not None, self
        return self.packed.spec(spec, row_symbol(self.level))

    def spread(self, lattice: Tensor) -> Tensor:
        """One entry a site, ``[H, W]``, as a tensor that broadcasts against a dense value."""
        assert self.is_rows, self
        if len(self.axes) == 1:
            return lattice.reshape([-1 if axis in self.axes else 1 for axis in range(self.rank)])
        height_axis, width_axis = self.axes
        sizes = dict(zip(self.axes, lattice.shape, strict=True))
        lattice = lattice if height_axis < width_axis else lattice.T
        return lattice.reshape([sizes.get(axis, 1) for axis in range(self.rank)])

    def __str__(self) -> str:
        if not self.is_rows:
            return self.kind + (f" ({self.reason})" if self.reason else "")
        return f"{self.kind}@{self.level}"


def opaque(rank: int, reason: str) -> Layout:
    """Of a value whose sites cannot be told apart, for this reason."""
    return Layout((Unknown(),) * rank, reason)


def image(level: Fraction) -> Layout:
    """``[batch, channels, height, width]``, as spatial inputs are."""
    return Layout((Batch(), Channel(), Sites(level, "height"), Sites(level, "width")))
