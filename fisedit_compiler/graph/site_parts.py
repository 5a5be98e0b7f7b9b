"""Which sites the entries of an axis are, where views have cut sites into windows or merged them with something else.

Shapes cannot tell: ``[b, h, 8, w, 8]`` is one level of windows, and ``[b, 8, h, 8, w]`` a grid of strides whose axes of
``h`` and ``w`` entries look like the same level. So every axis is written as *parts*, digits of a coordinate: the axis
of ``8*h`` rows is the rows' coordinate, a view to ``[h, 8]`` has its upper digit and its lower one. Moves of axes only
reorder parts, and a value's axes are sites of a level if they are the upper digits of height and width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import sympy

from fisedit_compiler.graph.layout import Layout
from fisedit_compiler.graph.site_order import is_identity
from fisedit_compiler.graph.sizes import HEIGHT, WIDTH
from fisedit_compiler.graph.specs import ValueSpec


@dataclass(frozen=True)
class Part:
    """Digit ``(coordinate // step) % size`` of a coordinate.

    Attributes:
        of: the coordinate: a level, whose sites are counted row after row; ``None`` for samples, channels and the like,
            which need not be told from each other.
        step: number of consecutive coordinates with one digit.
        size: number of digits.
    """

    of: Fraction | None
    step: sympy.Expr
    size: sympy.Expr


Axis = tuple[Part, ...]


@dataclass(frozen=True)
class Parts:
    """A value's parts.

    Attributes:
        order: all of them, the slowest first; ``None`` if not even that is known.
        axes: those of every axis; ``None`` if an axis ends inside of a part.
    """

    order: Axis | None
    axes: tuple[Axis, ...] | None

    @classmethod
    def by_axis(cls, axes: Iterable[Axis]) -> Parts:
        found = tuple(_merged(axis) for axis in axes)
        return cls(tuple(part for axis in found for part in axis), found)

    def viewed(self, spec: ValueSpec) -> Parts:
        """After a view: the same parts in the same order, cut anew."""
        if self.order is None:
            return LOST
        axes = _cut(_merged(self.order), spec.shape)
        return Parts(self.order, None) if axes is None else Parts.by_axis(axes)

    def permuted(self, order: Sequence[int]) -> Parts:
        """After a permutation."""
        if is_identity(order):
            return self
        return LOST if self.axes is None else Parts.by_axis(self.axes[axis] for axis in order)

    def carried(self, before: ValueSpec, after: ValueSpec) -> Parts:
        """After an operation that moves nothing between axes; an axis of another size holds no sites that are known."""
        if self.axes is None:
            return self if before.shape == after.shape else LOST
        if before.rank != after.rank:
            return LOST
        pairs = zip(self.axes, before.shape, after.shape, strict=True)
        return Parts.by_axis(axis if old == new else _without_sites(new) for axis, old, new in pairs)

    def are_sites_of(self, layout: Layout, multiple: int) -> bool:
        """Whether the site axes of a map or tokens are the sites of its level, row after row."""
        if self.axes is None or layout.level is None:
            return False
        found = [self.axes[axis] for axis in layout.axes]
        level = next((part.of for axis in found for part in axis), None)
        if level is None or (layout.level / level).denominator != 1:
            return False
        factor = int(layout.level / level)
        height, width = _lattice(level, multiple)
        sides = (Part(level, factor * width, height / factor), Part(level, sympy.Integer(factor), width / factor))
        return found == ([_merged(sides)] if layout.kind == "tokens" else [(side,) for side in sides])


LOST = Parts(None, None)
"""Of a value whose sites may lie anywhere."""


def parts_of(layout: Layout, spec: ValueSpec, multiple: int) -> Parts:
    """Parts of a map or tokens whose sites are in order."""
    assert layout.level is not None, layout
    _, width = _lattice(layout.level, multiple)
    steps = (width, sympy.Integer(1)) if layout.kind == "map" else (sympy.Integer(1),)
    sites = {axis: (Part(layout.level, step, spec.shape[axis]),) for axis, step in zip(layout.axes, steps, strict=True)}
    return Parts.by_axis(sites.get(axis) or _without_sites(size) for axis, size in enumerate(spec.shape))


def _lattice(level: Fraction, multiple: int) -> tuple[sympy.Expr, sympy.Expr]:
    scale = sympy.Rational(multiple * level.denominator, level.numerator)
    return scale * HEIGHT, scale * WIDTH


def _without_sites(size: sympy.Expr) -> Axis:
    return () if size == 1 else (Part(None, sympy.Integer(1), size),)


def _merged(axis: Iterable[Part]) -> Axis:
    """Digits next to each other as one."""
    found: list[Part] = []
    for part in axis:
        if found and found[-1].of == part.of and (part.of is None or found[-1].step == part.step * part.size):
            found[-1] = replace(part, size=found[-1].size * part.size)
        else:
            found.append(part)
    return tuple(found)


def _cut(order: Axis, shape: Sequence[sympy.Expr]) -> list[Axis] | None:
    """The parts of axes of these sizes, ``None`` if one of them ends where no part can be cut."""
    parts, axes = list(reversed(order)), []
    for size in shape:
        axis: list[Part] = []
        while size != 1:
            if not parts:
                return None
            part = parts.pop()
            if not _divides(part.size, size):
                if not _divides(size, part.size):
                    return None
                inner = part.size / size
                parts.append(replace(part, size=inner))
                part = replace(part, step=part.step * inner, size=size)
            axis.append(part)
            size = size / part.size
        axes.append(tuple(axis))
    return axes


def _divides(divisor: sympy.Expr, size: sympy.Expr) -> bool:
    return bool((size / divisor).as_numer_denom()[1] == 1)
