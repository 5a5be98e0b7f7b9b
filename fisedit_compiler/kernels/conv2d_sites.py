"""``fisedit::conv2d_sites``: a convolution computed at active sites only, through an index table.

What it reads is put together from the new rows and the recording; ``convolve`` does the rest. Padding, a fused nearest
upsampling and which sites are active are all in the tables (``fisedit_compiler.geometry.site_plan`` builds them), so
nothing of that geometry may appear here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import Tensor

from fisedit_compiler.graph.specs import ValueSpec, nbytes
from fisedit_compiler.kernels.convolve import check_table, check_weight, convolve
from fisedit_compiler.kernels.formulas import sites_convolution_flops
from fisedit_compiler.kernels.registry import define_op, require
from fisedit_compiler.kernels.traits import OpTraits, Update

_NAME = "conv2d_sites"


def _check(rows: Tensor, canvas: Tensor, taps: Tensor, places: Tensor, weight: Tensor, kernel: Sequence[int]) -> None:
    require(
        rows.dim() == 3 and canvas.dim() == 3,
        _NAME,
        lambda: f"rows and canvas must be [B, sites, C], got {rows.dim()} and {canvas.dim()} dimensions",
    )
    check_table(_NAME, taps, places)
    check_weight(_NAME, weight, int(rows.shape[2]), kernel)


def readable_values(rows: Tensor, canvas: Tensor, ring: Tensor) -> Tensor:
    """Everything the convolution may read, ``[B, N_in + R + 1, C]``: new rows, recorded ring, a site of zeros."""
    zero = rows.new_zeros(rows.shape[0], 1, rows.shape[2])
    return torch.cat([rows, canvas.index_select(1, ring), zero], dim=1)


def _reference(
    rows: Tensor, canvas: Tensor, ring: Tensor, taps: Tensor, places: Tensor, weight: Tensor, bias: Tensor | None,
    kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    _check(rows, canvas, taps, places, weight, kernel)
    return convolve(readable_values(rows, canvas, ring), taps, places, weight, bias, kernel, stride, dilation)


def _fake(
    rows: Tensor, canvas: Tensor, ring: Tensor, taps: Tensor, places: Tensor, weight: Tensor, bias: Tensor | None,
    kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    _check(rows, canvas, taps, places, weight, kernel)
    return rows.new_empty(rows.shape[0], places.shape[0], weight.shape[0])


def _flops(args: list[Any], out: ValueSpec) -> sympy.Expr:
    return sites_convolution_flops(args[5], args[7], out)


def _bytes(args: list[Any], out: ValueSpec) -> sympy.Expr:
    """Of the canvas only the ring is read."""
    rows, canvas, ring, *others = args[:7]
    read = ValueSpec((canvas.shape[0], *ring.shape, canvas.shape[2]), canvas.dtype)
    return sympy.Add(*(nbytes(spec) for spec in (rows, read, ring, *others, out) if spec is not None))


_OP = define_op(
    f"{_NAME}(Tensor rows, Tensor canvas, Tensor ring, Tensor taps, Tensor places, Tensor weight, Tensor? bias, "
    "int[2] kernel, int[2] stride, int[2] dilation) -> Tensor",
    _reference,
    _fake,
    traits=OpTraits(flops=_flops, bytes=_bytes, inline=_reference, updates=(Update(recorded=1, new=0),)),
)


def conv2d_sites(
    rows: Tensor, canvas: Tensor, ring: Tensor, taps: Tensor, places: Tensor, weight: Tensor, bias: Tensor | None,
    kernel: Sequence[int], stride: Sequence[int] = (1, 1), dilation: Sequence[int] = (1, 1),
) -> Tensor:  # fmt: skip
    """Outputs of a convolution at the active sites, reading inactive inputs from a recording.

    The pixel-wise sparse convolution of the FISEdit paper (AAAI 2024), as an index table.

    Args:
        rows: new input rows ``[B, N_in, C]``.
        canvas: recorded input ``[B, S_in, C]``, of the dtype of ``rows``.
        ring: int64 ``[R]``, sites of the canvas that are read although inactive.
        taps: int64 ``[blocks, p*p]``, the patch that each block of ``b`` by ``b`` outputs reads (for ``b`` = 1 the taps
            of each output, ``[N_out, K]``): indices into ``rows`` (first ``N_in``), ``canvas[:, ring]`` (next ``R``)
            and one zero site (index ``N_in + R``) that stands for the padding, and in a patch for every site that no
            active output reads.
        places: int64 ``[N_out]``, where among the ``blocks*b*b`` outputs each active row is; see ``convolve``.
        weight: packed by ``pack_conv_weight``, ``[O, K*C]``.
        bias: ``[O]`` or ``None``.
        kernel: height and width of the kernel, ``K`` their product.
        stride: stride along height and width.
        dilation: dilation along height and width.

    Returns:
        ``[B, N_out, O]``, contiguous, of the dtype of ``rows``.

    Raises:
        KernelError: weight or table do not fit the convolution, or a tensor has the wrong number of dimensions.
    """
    return _OP(rows, canvas, ring, taps, places, weight, bias, list(kernel), list(stride), list(dilation))
