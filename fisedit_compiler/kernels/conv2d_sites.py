"""``fisedit::conv2d_sites``: a convolution computed at active sites only, through an index table of its taps.

One gather and one GEMM. Kernel size, stride, padding, dilation and a fused nearest upsampling are all in the
table (``fisedit_compiler.runtime.site_plan`` builds it), so nothing of that geometry may appear here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisedit_compiler.kernels.registry import define_op, provide, require

_NAME = "conv2d_sites"


def _check(rows: Tensor, canvas: Tensor, taps: Tensor, weight: Tensor) -> None:
    require(
        rows.dim() == 3 and canvas.dim() == 3,
        _NAME,
        lambda: f"rows and canvas must be [B, sites, C], got {rows.dim()} and {canvas.dim()} dimensions",
    )
    require(
        taps.dim() == 2 and weight.dim() == 2,
        _NAME,
        lambda: (
            f"taps must be [N, K] and weight [K*C, O], got {taps.dim()} and {weight.dim()} dimensions; "
            "pack the weight with pack_conv_weight"
        ),
    )
    require(
        weight.shape[0] == taps.shape[1] * rows.shape[2],
        _NAME,
        lambda: (
            f"weight has {weight.shape[0]} input rows, but {taps.shape[1]} taps of {rows.shape[2]} channels "
            f"need {taps.shape[1] * rows.shape[2]}; pack the weight, and take taps of the same convolution"
        ),
    )


def _gather(values: Tensor, taps: Tensor) -> Tensor:
    """``values`` [B, T, C] read at ``taps`` [N, K]: the GEMM's left operand, [B*N, K*C]."""
    batch, sites, channels = values.shape
    if batch > 1 and values.is_cpu:
        # On the CPU, index_select along dimension 0 copies whole rows and is several times faster.
        start = torch.arange(0, batch * sites, sites, device=taps.device)
        index = (taps.reshape(1, -1) + start[:, None]).reshape(-1)
        gathered = values.reshape(-1, channels).index_select(0, index)
    else:
        gathered = values.index_select(1, taps.reshape(-1))
    return gathered.reshape(batch * taps.shape[0], taps.shape[1] * channels)


def _reference(rows: Tensor, canvas: Tensor, ring: Tensor, taps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check(rows, canvas, taps, weight)
    zero = rows.new_zeros(rows.shape[0], 1, rows.shape[2])
    values = torch.cat([rows, canvas.index_select(1, ring), zero], dim=1)
    gathered = _gather(values, taps)
    out = gathered @ weight if bias is None else torch.addmm(bias, gathered, weight)
    return out.reshape(rows.shape[0], taps.shape[0], weight.shape[1])


def _fake(rows: Tensor, canvas: Tensor, ring: Tensor, taps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check(rows, canvas, taps, weight)
    return rows.new_empty(rows.shape[0], taps.shape[0], weight.shape[1])


_OP = define_op(
    f"{_NAME}(Tensor rows, Tensor canvas, Tensor ring, Tensor taps, Tensor weight, Tensor? bias) -> Tensor",
    _reference,
    _fake,
)


def _cuda(rows: Tensor, canvas: Tensor, ring: Tensor, taps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if rows.dtype not in (torch.float16, torch.bfloat16):
        return _reference(rows, canvas, ring, taps, weight, bias)  # tensor cores would round fp32 to tf32
    from fisedit_compiler.kernels.triton.conv2d_sites import conv2d_sites as kernel

    return kernel(rows, canvas, ring, taps, weight, bias)


provide(_NAME, "CUDA", _cuda)


def conv2d_sites(
    rows: Tensor, canvas: Tensor, ring: Tensor, taps: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Outputs of a convolution at the active sites, reading inactive inputs from a recording.

    The pixel-wise sparse convolution of the FISEdit paper (AAAI 2024), as an index table.

    Args:
        rows: new input rows ``[B, N_in, C]``.
        canvas: recorded input ``[B, S_in, C]``, of the dtype of ``rows``.
        ring: int64 ``[R]``, sites of the canvas that are read although inactive.
        taps: int64 ``[N_out, K]``, indices into ``rows`` (first ``N_in``), ``canvas[:, ring]`` (next ``R``)
            and one zero site (index ``N_in + R``) that stands for the padding.
        weight: packed by ``pack_conv_weight``, ``[K*C, O]``.
        bias: ``[O]`` or ``None``.

    Returns:
        ``[B, N_out, O]``, contiguous, of the dtype of ``rows``.

    Raises:
        KernelError: the weight does not fit the taps, or a tensor has the wrong number of dimensions.
    """
    return _OP(rows, canvas, ring, taps, weight, bias)
