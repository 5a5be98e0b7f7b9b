"""What one convolution reads, as index tables: its ring, the taps of single outputs, the patches of blocks of them.

Geometry of one convolution at a time; which sites are active, and how levels fit together, is ``site_plan.py``'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from fisedit_compiler.errors import PlanError
from fisedit_compiler.geometry.patches import patch_shape


@dataclass(frozen=True)
class ConvKey:
    """Geometry of one convolution as an index table; convolutions with equal keys share their tables.

    Attributes:
        source: level of the input canvas (1 is the spatial input's own resolution, 2 half of it, 1/2 double).
        target: level of the output.
        kernel: height and width of the kernel.
        stride: stride along height and width.
        padding: zero padding along height and width, on both sides.
        dilation: dilation along height and width.
        upsample: nearest upsampling of the source before the convolution; taps index the coarse canvas.
    """

    source: Fraction
    target: Fraction
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    upsample: int = 1

    @property
    def in_blocks(self) -> bool:
        """Whether outputs share what they read, so that computing them in blocks can pay."""
        return self.kernel != (1, 1)

    def patch(self, size: int) -> tuple[int, int]:
        """Height and width of what a block of ``size`` by ``size`` outputs reads, in upsampled sites."""
        return patch_shape(size if self.in_blocks else 1, self.kernel, self.stride, self.dilation)

    def __str__(self) -> str:
        steps = [f"{self.kernel[0]}x{self.kernel[1]}", f"{self.source}->{self.target}"]
        steps += [f"stride {self.stride[0]}"] if self.stride != (1, 1) else []
        steps += [f"dilation {self.dilation[0]}"] if self.dilation != (1, 1) else []
        steps += [f"upsample {self.upsample}"] if self.upsample != 1 else []
        return " ".join(steps)


def _check_geometry(key: ConvKey, source: tuple[int, int], target: tuple[int, int]) -> None:
    for axis in (0, 1):
        padded = source[axis] * key.upsample + 2 * key.padding[axis]
        reach = key.dilation[axis] * (key.kernel[axis] - 1) + 1
        outputs = (padded - reach) // key.stride[axis] + 1
        if outputs != target[axis]:
            raise PlanError(
                f"convolution {key} turns {source[axis]} sites of level {key.source} into {outputs}, but "
                f"level {key.target} has {target[axis]}; its levels, stride, padding or upsampling are wrong"
            )


def tabulate(
    key: ConvKey, rows_in: Tensor, rows_out: Tensor, masks: Mapping[Fraction, Tensor]
) -> tuple[Tensor, Tensor]:
    """Ring ``[R]`` and taps ``[N_out, K]`` of one convolution from the active sites of its two levels."""
    height, width = masks[key.source].shape
    out_height, out_width = masks[key.target].shape
    _check_geometry(key, (height, width), (out_height, out_width))
    site_count = height * width

    y = _reads(rows_out // out_width, key, 0)[:, :, None]  # [N_out, kh, 1]
    x = _reads(rows_out % out_width, key, 1)[:, None, :]  # [N_out, 1, kw]
    site = _sites(y, x, key, height, width).flatten(1)  # [N_out, K]

    is_ring = torch.zeros(site_count + 1, dtype=torch.bool, device=site.device)
    is_ring[site.flatten()] = True
    is_ring[rows_in] = False
    is_ring[site_count] = False
    ring = is_ring.nonzero().flatten()
    return ring, _positions(site_count, rows_in, ring)[site]


def _reads(coordinate: Tensor, key: ConvKey, axis: int) -> Tensor:
    """Where output ``coordinate`` ``[N]`` reads along one axis of the upsampled source: ``[N, kernel]``."""
    offsets = torch.arange(key.kernel[axis], device=coordinate.device) * key.dilation[axis] - key.padding[axis]
    return coordinate[:, None] * key.stride[axis] + offsets


def _sites(y: Tensor, x: Tensor, key: ConvKey, height: int, width: int) -> Tensor:
    """Source sites at upsampled coordinates; one behind the last for what lies outside the map."""
    inside = (y >= 0) & (y < height * key.upsample) & (x >= 0) & (x < width * key.upsample)
    return torch.where(inside, (y // key.upsample) * width + x // key.upsample, height * width)


def _positions(site_count: int, rows: Tensor, ring: Tensor) -> Tensor:
    """``[site_count + 1]``: where a source site is in ``[rows, ring, the zero site]``, the last for all others."""
    known = rows.shape[0] + ring.shape[0]
    position = torch.full((site_count + 1,), known, dtype=torch.int64, device=rows.device)
    position[rows] = torch.arange(rows.shape[0], device=rows.device)
    position[ring] = torch.arange(rows.shape[0], known, device=rows.device)
    return position


def patch_table(key: ConvKey, size: int, blocks: Tensor, source: tuple[int, int], rows: Tensor, ring: Tensor) -> Tensor:
    """The table ``[blocks, p*p]`` of one convolution in blocks of ``size`` by ``size`` outputs.

    Args:
        key: the convolution.
        size: sites along a block's side.
        blocks: int64 ``[blocks, 2]``, row and column of each block among the blocks of its level.
        source: height and width of the source level.
        rows: int64 ``[N_in]``, active sites of the source level.
        ring: int64 ``[R]``, the convolution's ring.
    """
    offsets = [torch.arange(extent, device=blocks.device) for extent in key.patch(size)]
    y, x = (
        (blocks[:, axis] * size * key.stride[axis] - key.padding[axis])[:, None] + offsets[axis] for axis in (0, 1)
    )  # [blocks, p] each
    site = _sites(y[:, :, None], x[:, None, :], key, *source).flatten(1)
    return _positions(source[0] * source[1], rows, ring)[site]
