"""``fisedit::matmul_parts``: a matrix product with its inner dimension cut, every part a result of its own.

A sparse step multiplies few rows by large weights. One GEMM then has too few output tiles for a GPU, which reads the
weights with a part of its processors; cut into parts that are computed side by side it reads them with all. Whoever
adds the parts up does it in a kernel that runs anyway (the next norm or residual). Measured: ``benchmarks/NOTES.md``.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor

from fisedit_compiler.graph.specs import elements
from fisedit_compiler.kernels.registry import define_op, require
from fisedit_compiler.kernels.traits import OpTraits

_NAME = "matmul_parts"
_ALIGNED = 64
"""Inputs that the vendor's GEMM loads at a time; a part is a multiple of them."""
_LEAST = 640
"""Inputs of a part, at least."""
_WIDE = 1280
"""Outputs above which one product has tiles enough."""


def choose_parts(inputs: int, outputs: int) -> int:
    """Into how many parts a product with a ``[outputs, inputs]`` weight is cut (1: not at all).

    From a sweep over the products of SD1.5, SD2.1 and SDXL at 5 to 30 % area on an H200 (``benchmarks/NOTES.md``). Rows
    are not asked for: where there are many, cutting costs a per cent or so.
    """
    if not _ALIGNED <= outputs <= _WIDE:
        return 1
    most = min(inputs // _LEAST, 4 if outputs == _WIDE else 6)
    return next((parts for parts in range(most, 1, -1) if inputs % (parts * _ALIGNED) == 0), 1)


def _check(rows: Tensor, weight: Tensor, parts: int) -> None:
    require(
        rows.dim() == 2 and weight.dim() == 2,
        _NAME,
        lambda: f"rows must be [M, K] and weight [O, K], got {rows.dim()} and {weight.dim()} dimensions",
    )
    require(
        rows.shape[1] == weight.shape[1] and parts > 0 and weight.shape[1] % parts == 0,
        _NAME,
        lambda: f"rows have {rows.shape[1]} inputs, the weight {weight.shape[1]}: not {parts} equal parts of the same",
    )


def _reference(rows: Tensor, weight: Tensor, parts: int) -> Tensor:
    _check(rows, weight, parts)
    if parts == 1:
        return torch.mm(rows, weight.t())[None]
    inner = weight.shape[1] // parts
    left = rows.reshape(rows.shape[0], parts, inner).transpose(0, 1)
    right = weight.reshape(weight.shape[0], parts, inner).permute(1, 2, 0)
    return torch.bmm(left, right)


def _fake(rows: Tensor, weight: Tensor, parts: int) -> Tensor:
    _check(rows, weight, parts)
    return rows.new_empty(parts, rows.shape[0], weight.shape[0])


def _flops(args: list[Any], out: Any) -> sympy.Expr:
    return 2 * elements(args[0].shape) * args[1].shape[0]


_OP = define_op(
    f"{_NAME}(Tensor rows, Tensor weight, int parts) -> Tensor", _reference, _fake, traits=OpTraits(flops=_flops)
)


def matmul_parts(rows: Tensor, weight: Tensor, parts: int) -> Tensor:
    """``rows @ weight.T`` as a sum that is left to the caller.

    Args:
        rows: ``[M, K]``.
        weight: ``[O, K]``.
        parts: a divisor of ``K``.

    Returns:
        ``[parts, M, O]`` of the dtype of ``rows``; summed along the first dimension it is the product.

    Raises:
        KernelError: the shapes contradict each other, or ``K`` is no multiple of ``parts``.
    """
    return _OP(rows, weight, parts)


def sum_parts(parts: Tensor, bias: Tensor | None) -> Tensor:
    """The parts added up in float32 at least, with the bias, in their own dtype: ``[P, ..., O]`` to ``[..., O]``.

    Written as additions, not as a reduction, so that a compiler fuses them into what reads the result.
    """
    total = parts[0].to(torch.promote_types(parts.dtype, torch.float32))
    for index in range(1, parts.shape[0]):
        total = total + parts[index]
    if bias is not None:
        total = total + bias
    return total.to(parts.dtype)
