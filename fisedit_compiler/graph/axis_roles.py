"""Roles of axes: what the entries along one axis of a value are."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import sympy

Side = Literal["height", "width", "both"]


@dataclass(frozen=True)
class Batch:
    """Samples, alone or together with what is folded into them, such as heads."""


@dataclass(frozen=True)
class Channel:
    """Neither samples nor sites: channels, heads, a text's tokens, an axis of one entry."""


@dataclass(frozen=True)
class Sites:
    """Sites of one level.

    Attributes:
        level: 1 is the spatial input's resolution, 2 is half of it.
        side: ``both`` for all sites on one axis, row after row; else the side of the lattice that the axis is.
    """

    level: Fraction
    side: Side = "both"


@dataclass(frozen=True)
class Joined:
    """Text and image tokens side by side.

    Attributes:
        segments: sizes of what lies side by side. A shape tells which they are, not which comes first.
    """

    segments: frozenset[sympy.Expr]


@dataclass(frozen=True)
class Unknown:
    """An axis of an opaque value."""


Role = Batch | Channel | Sites | Joined | Unknown
