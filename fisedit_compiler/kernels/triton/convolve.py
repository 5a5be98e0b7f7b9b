"""Implicit GEMM: a convolution that reads through its index table, nothing is gathered or unfolded in memory.

``out[b, n] = bias + sum_k values[b, table(n, k)] @ weight[k]`` with fp32 accumulation. A program owns a tile of
``BLOCK_M`` outputs (batch and site flattened) by ``BLOCK_N`` channels; its loop runs over taps and blocks of input
channels, following the table by one indirection. Skinny shapes split that loop over several programs, whose partial
sums a second kernel adds up. In blocks of sites (``geometry/patches.py``) an output's tap is an entry of its block's
patch; unlike patches that are gathered, outputs that nobody asked for are not computed. What surrounds a convolution
in a UNet can be done with it: the affine map and SiLU of a normalisation on the rows that are read, and bias, time
embedding and residual on what is written. The idea is the pixel-wise sparse convolution of FISEdit (AAAI 2024) as an
implicit GEMM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fisedit_compiler.geometry.patches import block_size_of, patch_shape
from fisedit_compiler.kernels.triton.launching import launch

NARROW_SITES = 1 << 16
"""Fewer sites than this are told apart by the low 16 bits of an index."""
# They differ from mask to mask, and a new mask must not compile a kernel.
_COUNTS = ["outputs", "sites_out", "sites_in", "rows_in", "splits", "elements"]


@triton.jit
def _finish(
    acc, batch, offs_n, place, inside, bias, row_bias, residual, out_channels,
    HAS_BIAS: tl.constexpr, HAS_ROW_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """The epilogue: bias ``[O]``, a bias per sample ``[B, O]``, and rows that are added."""
    if HAS_BIAS:
        acc += tl.load(bias + offs_n + tl.zeros_like(place), mask=inside, other=0.0).to(tl.float32)
    if HAS_ROW_BIAS:
        acc += tl.load(row_bias + batch * out_channels + offs_n, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        acc += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    return acc


@triton.jit(do_not_specialize=_COUNTS)
def _convolve_kernel(
    values, table, places, weight, bias, row_bias, residual, scale, shift, out, partial,
    outputs, sites_out, sites_in, rows_in, in_channels, out_channels, splits,
    SIZE: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ROW_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_NORM: tl.constexpr,
    NARROW: tl.constexpr, EVEN_C: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    split = tl.program_id(1)
    tiles_n = tl.cdiv(out_channels, BLOCK_N)
    # Neighbouring programs share their sites, so that what they read hits L2.
    offs_m = (tile // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    offs_n = (tile % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    offs_k = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    in_m = offs_m < outputs
    in_n = offs_n < out_channels
    batch = offs_m // sites_out
    site = offs_m % sites_out
    if SIZE == 1:
        entry = site.to(tl.int64) * (KERNEL_H * KERNEL_W)
    else:
        place = tl.load(places + site, mask=in_m, other=0)
        within = place % (SIZE * SIZE)
        corner = (within // SIZE) * (STRIDE_H * PATCH_W) + (within % SIZE) * STRIDE_W
        entry = (place // (SIZE * SIZE)) * (PATCH_H * PATCH_W) + corner
    value_start = batch.to(tl.int64) * sites_in  # [BLOCK_M]
    norm_start = batch.to(tl.int64) * in_channels
    taps: tl.constexpr = KERNEL_H * KERNEL_W
    filter_start = offs_n.to(tl.int64) * (taps * in_channels)  # [BLOCK_N]

    blocks = tl.cdiv(in_channels, BLOCK_K)
    steps = taps * blocks
    per_split = tl.cdiv(steps, splits)
    first = split * per_split
    last = tl.minimum(first + per_split, steps)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(first, last):
        tap = step // blocks
        channel = (step % blocks) * BLOCK_K + offs_k
        step_down: tl.constexpr = DILATION_H * PATCH_W
        offset = tap if SIZE == 1 else (tap // KERNEL_W) * step_down + (tap % KERNEL_W) * DILATION_W
        # The low 16 bits of an int64 index: elements that small are left out of the pipeline of asynchronous copies,
        # and only so are the loads behind them pipelined at full depth.
        if NARROW:
            index = tl.load(table + (entry + offset) * 4, mask=in_m, other=0).to(tl.int32) & 0xFFFF
        else:
            index = tl.load(table + entry + offset, mask=in_m, other=0)
        source = (value_start + index) * in_channels  # [BLOCK_M]
        filters = filter_start + tap * in_channels
        in_c = channel < in_channels
        if EVEN_C:
            a = tl.load(values + source[:, None] + channel[None, :], mask=in_m[:, None], other=0.0)
            w = tl.load(weight + filters[None, :] + channel[:, None], mask=in_n[None, :], other=0.0)
        else:
            a = tl.load(values + source[:, None] + channel[None, :], mask=in_m[:, None] & in_c[None, :], other=0.0)
            w = tl.load(weight + filters[None, :] + channel[:, None], mask=in_n[None, :] & in_c[:, None], other=0.0)
        if HAS_NORM:
            known = in_m[:, None] & in_c[None, :]
            norm = norm_start[:, None] + channel[None, :]
            x = a.to(tl.float32) * tl.load(scale + norm, mask=known, other=0.0).to(tl.float32)
            x += tl.load(shift + norm, mask=known, other=0.0).to(tl.float32)
            # What was recorded, and the padding, lie behind the normalisation already.
            a = tl.where((index < rows_in)[:, None], (x * tl.sigmoid(x)).to(a.dtype), a)
        acc = tl.dot(a, w, acc)

    inside = in_m[:, None] & in_n[None, :]
    place = offs_m.to(tl.int64)[:, None] * out_channels + offs_n[None, :]
    if SPLIT:
        tl.store(partial + split.to(tl.int64) * outputs * out_channels + place, acc, mask=inside)
    else:
        acc = _finish(
            acc, batch.to(tl.int64)[:, None], offs_n[None, :], place, inside, bias, row_bias, residual, out_channels,
            HAS_BIAS, HAS_ROW_BIAS, HAS_RESIDUAL,
        )  # fmt: skip
        tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_COUNTS)
def _sum_splits_kernel(
    partial, bias, row_bias, residual, out, elements, sites_out, out_channels, splits,
    HAS_BIAS: tl.constexpr, HAS_ROW_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = place < elements
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in range(splits):
        acc += tl.load(partial + split * elements.to(tl.int64) + place, mask=inside, other=0.0)
    batch = place // out_channels // sites_out
    acc = _finish(
        acc, batch, place % out_channels, place, inside, bias, row_bias, residual, out_channels,
        HAS_BIAS, HAS_ROW_BIAS, HAS_RESIDUAL,
    )  # fmt: skip
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Tile:
    """Launch parameters of one convolution."""

    block_m: int
    block_n: int
    block_k: int
    split_k: int = 1
    warps: int = 4
    stages: int = 4


def choose_tile(outputs: int, out_channels: int, in_channels: int, taps: int, processors: int) -> Tile:
    """Tile and split for a shape: enough programs to fill the chip, no split shorter than eight steps."""
    block_k = 64 if in_channels % 64 == 0 else (32 if in_channels % 32 == 0 else 16)
    block_n = 128 if out_channels >= 128 and outputs >= 64 * processors else 64
    block_m = 128 if outputs >= 128 * processors // 4 else (64 if outputs > 32 else (32 if outputs > 16 else 16))
    programs = triton.cdiv(outputs, block_m) * triton.cdiv(out_channels, block_n)
    steps = taps * triton.cdiv(in_channels, block_k)
    split = 1
    while split < 16 and programs * split * 2 <= 2 * processors and steps // (split * 2) >= 8:
        split *= 2
    return Tile(block_m, block_n, block_k, split, warps=8 if block_m * block_n >= 128 * 128 else 4)


@dataclass(frozen=True)
class Surroundings:
    """What is done with a convolution besides it.

    Attributes:
        rows: the first so many sites of the values are normalised on the way in; the others are as they are.
        scale: ``[B, C]``, factors of the normalisation; with ``shift``, and SiLU behind both.
        shift: ``[B, C]``.
        row_bias: ``[B, O]``, added to all outputs of a sample (the time embedding).
        residual: ``[B, N, O]``, added to the outputs.
    """

    rows: int = 0
    scale: Tensor | None = None
    shift: Tensor | None = None
    row_bias: Tensor | None = None
    residual: Tensor | None = None


def convolve(
    values: Tensor, taps: Tensor, places: Tensor, weight: Tensor, bias: Tensor | None,
    kernel: Sequence[int], stride: Sequence[int] = (1, 1), dilation: Sequence[int] = (1, 1),
    around: Surroundings | None = None, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """The ``fisedit::convolve`` op as an implicit GEMM; see its reference for shapes.

    ``around`` adds what surrounds the convolution; ``tile`` forces launch parameters (tests, tuning).
    """
    around = around or Surroundings()
    values, weight, taps, places = values.contiguous(), weight.contiguous(), taps.contiguous(), places.contiguous()
    batch, sites_in, in_channels = values.shape
    sites_out, out_channels = places.shape[0], weight.shape[0]
    outputs = batch * sites_out
    out = values.new_empty(batch, sites_out, out_channels)
    if outputs == 0:
        return out
    size = block_size_of(taps.shape[1], kernel, stride, dilation)
    assert size is not None, "the op's reference checks tables before a kernel sees them"
    patch = patch_shape(size, kernel, stride, dilation)
    if tile is None:
        processors = torch.cuda.get_device_properties(values.device).multi_processor_count if values.is_cuda else 1
        tile = choose_tile(outputs, out_channels, in_channels, kernel[0] * kernel[1], processors)
    split = tile.split_k
    partial = values.new_empty((split, outputs, out_channels), dtype=torch.float32) if split > 1 else out
    narrow = sites_in < NARROW_SITES
    extras = [
        unused if given is None else given.contiguous()
        for given, unused in ((bias, weight), (around.row_bias, weight), (around.residual, weight))
    ]
    norm = [weight if given is None else given.contiguous() for given in (around.scale, around.shift)]
    has = {
        "HAS_BIAS": bias is not None,
        "HAS_ROW_BIAS": around.row_bias is not None,
        "HAS_RESIDUAL": around.residual is not None,
    }
    grid = (triton.cdiv(outputs, tile.block_m) * triton.cdiv(out_channels, tile.block_n), split)
    launch(
        _convolve_kernel, grid,
        values, taps.view(torch.int16) if narrow else taps, places, weight, *extras, *norm, out, partial,
        outputs, sites_out, sites_in, around.rows, in_channels, out_channels, split,
        SIZE=size, KERNEL_H=kernel[0], KERNEL_W=kernel[1], STRIDE_H=stride[0], STRIDE_W=stride[1],
        DILATION_H=dilation[0], DILATION_W=dilation[1], PATCH_H=patch[0], PATCH_W=patch[1],
        HAS_NORM=around.scale is not None, NARROW=narrow, EVEN_C=in_channels % tile.block_k == 0, SPLIT=split > 1,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, **has,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if split > 1:
        elements = outputs * out_channels
        block = 1024
        launch(
            _sum_splits_kernel, (triton.cdiv(elements, block),),
            partial, *extras, out, elements, sites_out, out_channels, split, BLOCK=block, **has,
        )  # fmt: skip
    return out
