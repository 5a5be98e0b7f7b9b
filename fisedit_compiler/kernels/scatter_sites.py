"""``fisedit::scatter_sites``: active rows written over a copy of a canvas."""

from __future__ import annotations

from torch import Tensor

from fisedit_compiler.kernels.registry import define_op, require
from fisedit_compiler.kernels.traits import OpTraits, no_products

_NAME = "scatter_sites"


def _check(rows: Tensor, canvas: Tensor) -> None:
    require(
        rows.dtype == canvas.dtype and rows.dim() == canvas.dim(),
        _NAME,
        lambda: (
            f"rows ({rows.dtype}, {rows.dim()} dims) and canvas ({canvas.dtype}, {canvas.dim()} dims) "
            "must agree; record and edit in the same dtype and layout"
        ),
    )


def _reference(rows: Tensor, canvas: Tensor, active: Tensor, dim: int) -> Tensor:
    _check(rows, canvas)
    # Functional, so that Inductor can take the op apart; index_copy makes the one copy there is.
    return canvas.contiguous().index_copy(dim, active, rows)


def _fake(rows: Tensor, canvas: Tensor, active: Tensor, dim: int) -> Tensor:
    _check(rows, canvas)
    return canvas.new_empty(canvas.shape)


_OP = define_op(
    f"{_NAME}(Tensor rows, Tensor canvas, Tensor active, int dim) -> Tensor",
    _reference,
    _fake,
    traits=OpTraits(flops=no_products, inline=_reference),
)


def scatter_sites(rows: Tensor, canvas: Tensor, active: Tensor, dim: int) -> Tensor:
    """A contiguous copy of ``canvas`` whose slices ``active`` (int64 ``[N]``) along ``dim`` are ``rows``.

    Every other element is bit-identical to the canvas, which is not mutated.

    Raises:
        KernelError: rows and canvas differ in dtype or number of dimensions.
    """
    return _OP(rows, canvas, active, dim)
