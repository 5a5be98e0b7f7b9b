"""Orders of axes in which the sites of a value lie on one axis, and the moves from the dense order and back.

A dense value comes to such an order in two steps: a permutation of its axes, then, for a map, merging height and width.
The steps are data, so that tensors take them here and graph builders write them as nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import sympy
import torch
from torch import Tensor

from fisedit_compiler.graph.specs import ValueSpec

SITES = -1
"""Stands for the site axis where axes of a dense value are named."""


@dataclass(frozen=True)
class SiteOrder:
    """One such order of the axes of one dense value.

    Attributes:
        permutation: the dense axes in the order that the first step brings them to; a map's width follows its height.
        site_dim: position of the site axis in the result.
        sides: how many dense axes become the site axis: 1 for tokens, 2 for a map.
    """

    permutation: tuple[int, ...]
    site_dim: int
    sides: int

    @cached_property
    def axes(self) -> tuple[int, ...]:
        """Dense axis behind each axis of the result, :data:`SITES` for the site axis."""
        return (*self.permutation[: self.site_dim], SITES, *self.permutation[self.site_dim + self.sides :])

    @property
    def site_axes(self) -> tuple[int, ...]:
        """The dense axes of the sites: height and width of a map."""
        return self.permutation[self.site_dim : self.site_dim + self.sides]

    @property
    def moves(self) -> bool:
        """Whether the first step changes the order of axes."""
        return not is_identity(self.permutation)

    @property
    def inverse(self) -> tuple[int, ...]:
        """The permutation that undoes the first step."""
        return tuple(self.permutation.index(axis) for axis in range(len(self.permutation)))

    def order_to(self, other: SiteOrder) -> tuple[int, ...]:
        """The permutation that brings a value of this order to another order of the same dense value."""
        return tuple(self.axes.index(axis) for axis in other.axes)

    def spec(self, spec: ValueSpec, sites: sympy.Expr | None = None) -> ValueSpec:
        """Spec of a dense value in this order, with ``sites`` entries on the site axis (all sites by default)."""
        if sites is None:
            sites = sympy.Mul(*(spec.shape[axis] for axis in self.site_axes))
        return ValueSpec(tuple(sites if axis == SITES else spec.shape[axis] for axis in self.axes), spec.dtype)

    def from_dense(self, value: Tensor) -> Tensor:
        """A dense value in this order; a view where its strides allow."""
        moved = value.permute(self.permutation) if self.moves else value
        return moved if self.sides == 1 else moved.flatten(self.site_dim, self.site_dim + 1)

    def to_dense(self, value: Tensor, lattice: Sequence[int]) -> Tensor:
        """The dense value of one in this order.

        Args:
            value: with all sites on the site axis.
            lattice: sizes of the dense site axes: height and width of a map.
        """
        apart = value if self.sides == 1 else torch.unflatten(value, self.site_dim, tuple(lattice))
        return apart.permute(self.inverse) if self.moves else apart

    def gather(self, value: Tensor, sites: Tensor) -> Tensor:
        """Some sites of a dense value, in this order.

        Args:
            value: the dense value.
            sites: int64 ``[N]``.
        """
        return self.from_dense(value).index_select(self.site_dim, sites)

    def write(self, value: Tensor, sites: Tensor, rows: Tensor) -> Tensor:
        """A copy of a dense value whose ``sites`` (int64 ``[N]``) are ``rows``, which are in this order."""
        written = put_rows(self.from_dense(value), self.site_dim, sites, rows)
        return self.to_dense(written, [value.shape[axis] for axis in self.site_axes])


def put_rows(value: Tensor, dim: int, sites: Tensor, rows: Tensor) -> Tensor:
    """A copy of ``value`` whose entries ``sites`` (int64 ``[N]``) of axis ``dim`` are ``rows``; of any dtype."""
    if value.dtype.itemsize == 1:  # no index_copy of eight-bit floats on a CPU
        return value.view(torch.uint8).index_copy(dim, sites, rows.view(torch.uint8)).view(value.dtype)
    return value.index_copy(dim, sites, rows)


def is_identity(order: Sequence[int]) -> bool:
    """Whether a permutation leaves every axis where it is."""
    return list(order) == list(range(len(order)))
