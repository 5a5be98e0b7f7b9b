"""Gather rows through a table of taps at memory bandwidth.

The output is ``B*N*K`` rows of ``C`` channels, one behind the other. A program copies ``BLOCK_ROWS`` of them, a block
of channels each, so that an index is loaded once a row and not once an element, as a fused pointwise kernel would.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fisedit_compiler.kernels.triton.launching import launch


# These differ from mask to mask, and a new mask must not compile a kernel.
@triton.jit(do_not_specialize=["rows", "taps_per_entry", "sites"])
def _gather_taps_kernel(
    values, taps, out, rows, taps_per_entry, sites, channels, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr
):  # fmt: skip
    offs_r = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    offs_c = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)  # [BLOCK_CHANNELS]
    in_r = offs_r < rows
    site = tl.load(taps + offs_r % taps_per_entry, mask=in_r, other=0)
    source = ((offs_r // taps_per_entry) * sites + site).to(tl.int64) * channels
    inside = in_r[:, None] & (offs_c < channels)[None, :]
    gathered = tl.load(values + source[:, None] + offs_c[None, :], mask=inside)  # [BLOCK_ROWS, BLOCK_CHANNELS]
    tl.store(out + offs_r.to(tl.int64)[:, None] * channels + offs_c[None, :], gathered, mask=inside)


def gather_taps(values: Tensor, taps: Tensor) -> Tensor:
    """The ``fisedit::gather_taps`` op on a GPU; see its reference for shapes."""
    values, taps = values.contiguous(), taps.contiguous()
    batch, sites, channels = values.shape
    rows = batch * taps.numel()
    out = values.new_empty(batch * taps.shape[0], taps.shape[1] * channels)
    if not out.numel():
        return out
    # Rows of 64 or 128 channels are whole cache lines; models' channels are multiples of one of them.
    block_channels = next((size for size in (128, 64) if channels % size == 0), 0)
    block_channels = block_channels or min(triton.next_power_of_2(channels), 128)
    block_rows = max(2048 // block_channels, 16)
    grid = (triton.cdiv(rows, block_rows), triton.cdiv(channels, block_channels))
    launch(
        _gather_taps_kernel, grid,
        values, taps, out, rows, taps.numel(), sites, channels,
        BLOCK_ROWS=block_rows, BLOCK_CHANNELS=block_channels,
    )  # fmt: skip
    return out
