"""``fisedit::gather_sites``: the active rows of a canvas."""

from __future__ import annotations

from torch import Tensor

from fisedit_compiler.kernels.registry import define_op


def _reference(canvas: Tensor, active: Tensor, dim: int) -> Tensor:
    return canvas.index_select(dim, active).contiguous()


def _fake(canvas: Tensor, active: Tensor, dim: int) -> Tensor:
    shape = list(canvas.shape)
    shape[dim] = active.shape[0]
    return canvas.new_empty(shape)


_OP = define_op("gather_sites(Tensor canvas, Tensor active, int dim) -> Tensor", _reference, _fake)


def gather_sites(canvas: Tensor, active: Tensor, dim: int) -> Tensor:
    """The slices ``active`` (int64 ``[N]``) of ``canvas`` along ``dim``, contiguous and never a view."""
    return _OP(canvas, active, dim)
