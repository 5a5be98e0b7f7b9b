"""``fisedit::gather_sites``: the active rows of a canvas."""

from __future__ import annotations

from typing import Any

import sympy
from torch import Tensor

from fisedit_compiler.graph.specs import nbytes
from fisedit_compiler.kernels.registry import define_op
from fisedit_compiler.kernels.traits import OpTraits, no_products


def _reference(canvas: Tensor, active: Tensor, dim: int) -> Tensor:
    return canvas.index_select(dim, active).contiguous()


def _fake(canvas: Tensor, active: Tensor, dim: int) -> Tensor:
    shape = list(canvas.shape)
    shape[dim] = active.shape[0]
    return canvas.new_empty(shape)


def _bytes(args: list[Any], out: Any) -> sympy.Expr:
    """Of the canvas only the active sites are read."""
    return 2 * nbytes(out) + nbytes(args[1])


_OP = define_op(
    "gather_sites(Tensor canvas, Tensor active, int dim) -> Tensor",
    _reference,
    _fake,
    traits=OpTraits(flops=no_products, bytes=_bytes, inline=_reference),
)


def gather_sites(canvas: Tensor, active: Tensor, dim: int) -> Tensor:
    """The slices ``active`` (int64 ``[N]``) of ``canvas`` along ``dim``, contiguous and never a view."""
    return _OP(canvas, active, dim)
