"""``fisedit::convolve_parts``: ``convolve`` with its products cut into parts, the sum left to the caller."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
from torch import Tensor

from fisedit_compiler.geometry.patches import block_size_of
from fisedit_compiler.kernels.convolve import check_lines, check_table, check_weight, convolve
from fisedit_compiler.kernels.formulas import sites_convolution_flops
from fisedit_compiler.kernels.gather_taps import gather_taps
from fisedit_compiler.kernels.matmul_parts import matmul_parts
from fisedit_compiler.kernels.registry import define_op, require
from fisedit_compiler.kernels.traits import OpTraits

_NAME = "convolve_parts"


def _check(values: Tensor, taps: Tensor, places: Tensor, weight: Tensor, parts: int, kernel: Sequence[int]) -> None:
    require(values.dim() == 3, _NAME, lambda: f"values must be [B, T, C], got {values.dim()} dimensions")
    check_table(_NAME, taps, places)
    check_weight(_NAME, weight, int(values.shape[2]), kernel)
    require(
        parts > 0 and weight.shape[1] % parts == 0,
        _NAME,
        lambda: f"{weight.shape[1]} inputs an output cannot be cut into {parts} equal parts",
    )


def _reference(
    values: Tensor, taps: Tensor, places: Tensor, weight: Tensor, parts: int,
    kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    _check(values, taps, places, weight, parts, kernel)
    if block_size_of(taps.shape[1], kernel, stride, dilation) == 1:
        check_lines(_NAME, taps, places)
        products = matmul_parts(gather_taps(values, taps), weight, parts)
        return products.view(parts, values.shape[0], places.shape[0], weight.shape[0])
    # A convolution over patches comes in one piece; nothing is added to it.
    out = values.new_zeros(parts, values.shape[0], places.shape[0], weight.shape[0])
    out[0] = convolve(values, taps, places, weight, None, kernel, stride, dilation)
    return out


def _fake(
    values: Tensor, taps: Tensor, places: Tensor, weight: Tensor, parts: int,
    kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    _check(values, taps, places, weight, parts, kernel)
    return values.new_empty(parts, values.shape[0], places.shape[0], weight.shape[0])


def _flops(args: list[Any], out: Any) -> sympy.Expr:
    return sites_convolution_flops(args[3], args[5], out)


_OP = define_op(
    f"{_NAME}(Tensor values, Tensor taps, Tensor places, Tensor weight, int parts, "
    "int[2] kernel, int[2] stride, int[2] dilation) -> Tensor",
    _reference,
    _fake,
    traits=OpTraits(flops=_flops),
)


def convolve_parts(
    values: Tensor, taps: Tensor, places: Tensor, weight: Tensor, parts: int,
    kernel: Sequence[int], stride: Sequence[int] = (1, 1), dilation: Sequence[int] = (1, 1),
) -> Tensor:  # fmt: skip
    """:func:`convolve` without a bias, as ``parts`` results that are to be added up.

    Args:
        values: see :func:`convolve`, like ``taps``, ``places``, ``weight``, ``kernel``, ``stride`` and ``dilation``.
        taps: see ``values``.
        places: see ``values``.
        weight: see ``values``.
        parts: a divisor of ``K*C``, the inputs of an output.
        kernel: see ``values``.
        stride: see ``values``.
        dilation: see ``values``.

    Returns:
        ``[parts, B, N, O]`` of the dtype of ``values``. In blocks of more than one output only the first is not zero.

    Raises:
        KernelError: weight or table do not fit the convolution, or ``K*C`` is no multiple of ``parts``.
    """
    return _OP(values, taps, places, weight, parts, list(kernel), list(stride), list(dilation))
