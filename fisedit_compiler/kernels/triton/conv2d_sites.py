"""Implicit GEMM over taps: rows and the recorded ring are read where they are, nothing is concatenated or unfolded.

``out[b, n] = bias + sum_k value(b, taps[n, k]) @ weight[k]`` with fp32 accumulation. A program owns a tile of
``BLOCK_M`` outputs (batch and site flattened) by ``BLOCK_N`` channels; its loop runs over taps and blocks of input
channels, following the tap table by one indirection. Skinny shapes split that loop over ``SPLIT_K`` programs, whose
partial sums a second kernel adds up. The idea is the pixel-wise sparse convolution of FISEdit (AAAI 2024) as an
implicit GEMM.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _conv2d_sites_kernel(
    rows, canvas, ring, taps, weight, bias, out, partial,
    outputs, sites_out, sites_in, ring_size, canvas_size, in_channels, out_channels,
    TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_C: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    split = tl.program_id(1)
    tiles_n = tl.cdiv(out_channels, BLOCK_N)
    # Neighbouring programs share their rows, so that the gather hits L2.
    offs_m = (tile // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    offs_n = (tile % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    offs_k = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    in_m = offs_m < outputs
    in_n = offs_n < out_channels
    batch = (offs_m // sites_out).to(tl.int64)
    site = (offs_m % sites_out).to(tl.int64)
    row_start = batch * sites_in
    canvas_start = batch * canvas_size

    blocks = tl.cdiv(in_channels, BLOCK_K)
    steps = TAPS * blocks
    per_split = tl.cdiv(steps, SPLIT_K)
    first = split * per_split
    last = tl.minimum(first + per_split, steps)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(first, last):
        tap = step // blocks
        channel = (step % blocks) * BLOCK_K + offs_k
        index = tl.load(taps + site * TAPS + tap, mask=in_m, other=sites_in + ring_size)  # [BLOCK_M]
        is_row = index < sites_in
        in_ring = (index >= sites_in) & (index < sites_in + ring_size)
        recorded = tl.load(ring + (index - sites_in), mask=in_ring, other=0)
        source = tl.where(
            is_row, rows + (row_start + index) * in_channels, canvas + (canvas_start + recorded) * in_channels
        )
        known = (is_row | in_ring)[:, None]
        weight_rows = (tap * in_channels + channel).to(tl.int64)
        if EVEN_C:
            values = tl.load(source[:, None] + channel[None, :], mask=known, other=0.0)  # [BLOCK_M, BLOCK_K]
            filters = tl.load(
                weight + weight_rows[:, None] * out_channels + offs_n[None, :], mask=in_n[None, :], other=0.0
            )  # [BLOCK_K, BLOCK_N]
        else:
            in_c = channel < in_channels
            values = tl.load(source[:, None] + channel[None, :], mask=known & in_c[None, :], other=0.0)
            filters = tl.load(
                weight + weight_rows[:, None] * out_channels + offs_n[None, :],
                mask=in_c[:, None] & in_n[None, :],
                other=0.0,
            )
        acc = tl.dot(values, filters, acc)

    inside = in_m[:, None] & in_n[None, :]
    place = offs_m.to(tl.int64)[:, None] * out_channels + offs_n[None, :]
    if SPLIT_K > 1:
        tl.store(partial + split.to(tl.int64) * outputs * out_channels + place, acc, mask=inside)
    else:
        if HAS_BIAS:
            acc += tl.load(bias + offs_n, mask=in_n, other=0.0).to(tl.float32)[None, :]
        tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_splits_kernel(
    partial, bias, out, elements, out_channels,
    HAS_BIAS: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = place < elements
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in tl.static_range(SPLIT_K):
        acc += tl.load(partial + split * elements.to(tl.int64) + place, mask=inside, other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias + place % out_channels, mask=inside, other=0.0).to(tl.float32)
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


def conv2d_sites(
    rows: Tensor, canvas: Tensor, ring: Tensor, taps: Tensor, weight: Tensor, bias: Tensor | None,
    tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """The ``fisedit::conv2d_sites`` op on a GPU; see its reference for shapes.

    ``tile`` forces launch parameters (tests, tuning).
    """
    rows, canvas, weight, taps = rows.contiguous(), canvas.contiguous(), weight.contiguous(), taps.contiguous()
    batch, sites_in, in_channels = rows.shape
    sites_out, tap_count = taps.shape
    out_channels = weight.shape[1]
    outputs = batch * sites_out
    out = rows.new_empty(batch, sites_out, out_channels)
    if outputs == 0:
        return out
    if tile is None:
        processors = torch.cuda.get_device_properties(rows.device).multi_processor_count if rows.is_cuda else 1
        tile = choose_tile(outputs, out_channels, in_channels, tap_count, processors)
    split = tile.split_k
    partial = rows.new_empty((split, outputs, out_channels), dtype=torch.float32) if split > 1 else out
    grid = (triton.cdiv(outputs, tile.block_m) * triton.cdiv(out_channels, tile.block_n), split)
    _conv2d_sites_kernel[grid](
        rows, canvas, ring, taps, weight, bias if bias is not None else weight, out, partial,
        outputs, sites_out, sites_in, ring.shape[0], canvas.shape[1], in_channels, out_channels,
        TAPS=tap_count, HAS_BIAS=bias is not None, EVEN_C=in_channels % tile.block_k == 0, SPLIT_K=split,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if split > 1:
        elements = outputs * out_channels
        block = 1024
        _sum_splits_kernel[(triton.cdiv(elements, block),)](
            partial, bias if bias is not None else weight, out, elements, out_channels,
            HAS_BIAS=bias is not None, SPLIT_K=split, BLOCK=block,
        )  # fmt: skip
    return out
