"""What a block of sites reads: the one piece of geometry that site plans and convolutions must agree on.

The active sites of a level are covered by aligned squares of ``size`` times ``size`` sites, its *blocks*. Size 1 is a
table of taps, one line per output. A larger block reads one *patch*, whose sites its outputs share: fewer copies than
taps, but a block with a single active site computes all its sites. This is the pixel-wise sparse convolution with
adaptive block sizes of FISEdit (Yu et al., AAAI 2024).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fisedit_compiler.config import BLOCK_SIZES


def patch_shape(size: int, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> tuple[int, int]:
    """Height and width of what a block of ``size`` by ``size`` outputs reads, in sites of the (upsampled) source.

    A block of one output reads its taps only, so for size 1 it is the kernel's, whatever the dilation.
    """
    if size == 1:
        return kernel[0], kernel[1]
    height, width = ((size - 1) * stride[axis] + (kernel[axis] - 1) * dilation[axis] + 1 for axis in (0, 1))
    return height, width


def block_size_of(columns: int, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> int | None:
    """The block size whose table has so many columns; ``None`` if there is none."""
    for size in BLOCK_SIZES:
        height, width = patch_shape(size, kernel, stride, dilation)
        if height * width == columns:
            return size
    return None


def output_taps(
    taps: Tensor, places: Tensor, size: int, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """The table of taps ``[N, K]`` that says the same as a table of patches.

    Args:
        taps: int64 ``[blocks, p*p]``, the patches of blocks of ``size`` by ``size`` outputs.
        places: int64 ``[N]`` into the ``blocks*size*size`` outputs.
        size: block size, above 1.
        kernel: height and width of the kernel.
        stride: stride along height and width.
        dilation: dilation along height and width.
    """
    width = patch_shape(size, kernel, stride, dilation)[1]
    outputs = torch.arange(size, device=taps.device)[:, None]
    y, x = (
        outputs * stride[axis] + torch.arange(kernel[axis], device=taps.device) * dilation[axis] for axis in (0, 1)
    )  # [size, kernel]
    reads = (y[:, None, :, None] * width + x[None, :, None, :]).reshape(size * size, -1)  # [size*size, K]
    line = places.div(size * size, rounding_mode="floor")
    return taps[line[:, None], reads[places % (size * size)]]
