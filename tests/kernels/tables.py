"""Index tables and inputs for the kernel tests, built independently of the package's site plans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fisedit_compiler.geometry.patches import patch_shape
from fisedit_compiler.kernels.pack_conv_weight import pack_conv_weight


@dataclass(frozen=True)
class Geometry:
    """A convolution on a small lattice, with the active sites of its input and output."""

    height: int
    width: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    dilation: int = 1

    @property
    def out_size(self) -> tuple[int, int]:
        reach = self.dilation * (self.kernel - 1) + 1
        size = [(n + 2 * self.padding - reach) // self.stride + 1 for n in (self.height, self.width)]
        return size[0], size[1]


GEOMETRIES = (
    Geometry(6, 9),
    Geometry(11, 8, stride=2),
    Geometry(9, 9, dilation=2, padding=2),
    Geometry(7, 7, kernel=2, padding=0),
    Geometry(9, 12, kernel=5, padding=2, stride=3),
)


def brute_force_taps(geometry: Geometry, active_in: Tensor, active_out: Tensor) -> tuple[Tensor, Tensor]:
    """Ring and taps by plain loops, the slow and obvious way."""
    row_of = {site: row for row, site in enumerate(active_in.tolist())}
    out_width = geometry.out_size[1]
    reads: list[list[int | None]] = []
    for site in active_out.tolist():
        reads.append([])
        for i in range(geometry.kernel):
            for j in range(geometry.kernel):
                y = (site // out_width) * geometry.stride - geometry.padding + i * geometry.dilation
                x = (site % out_width) * geometry.stride - geometry.padding + j * geometry.dilation
                inside = 0 <= y < geometry.height and 0 <= x < geometry.width
                reads[-1].append(y * geometry.width + x if inside else None)
    ring = sorted({s for line in reads for s in line if s is not None and s not in row_of})
    place: dict[int | None, int] = {site: len(row_of) + n for n, site in enumerate(ring)}
    place.update(row_of)
    place[None] = len(row_of) + len(ring)
    taps = torch.tensor([[place[s] for s in line] for line in reads], dtype=torch.int64)
    return torch.tensor(ring, dtype=torch.int64), taps.reshape(len(reads), geometry.kernel**2)


def options(geometry: Geometry) -> tuple[tuple[int, int], ...]:
    """Kernel, stride and dilation as the op takes them."""
    return (geometry.kernel,) * 2, (geometry.stride,) * 2, (geometry.dilation,) * 2


def brute_force_patches(geometry: Geometry, active: list[int], size: int) -> tuple[Tensor, Tensor]:
    """Patches (for size 1 taps) and places by plain loops; the values are all sites, then a zero site."""
    out_width = geometry.out_size[1]
    where = {(site // out_width, site % out_width): site for site in active}
    blocks = sorted({(y // size, x // size) for y, x in where})
    extent = patch_shape(size, *options(geometry))
    apart = geometry.dilation if size == 1 else 1
    lines = []
    for block_y, block_x in blocks:
        lines.append([])
        for i in range(extent[0]):
            for j in range(extent[1]):
                y = block_y * size * geometry.stride - geometry.padding + i * apart
                x = block_x * size * geometry.stride - geometry.padding + j * apart
                inside = 0 <= y < geometry.height and 0 <= x < geometry.width
                lines[-1].append(y * geometry.width + x if inside else geometry.height * geometry.width)
    places = [
        blocks.index((y // size, x // size)) * size * size + (y % size) * size + x % size for y, x in sorted(where)
    ]
    patches = torch.tensor(lines, dtype=torch.int64).reshape(len(blocks), extent[0] * extent[1])
    return patches, torch.tensor(places, dtype=torch.int64)


def convolution_case(geometry: Geometry, count: int, size: int, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Arguments of ``convolve`` for ``count`` random outputs, and what a dense convolution gives there."""
    sites = geometry.out_size[0] * geometry.out_size[1]
    active = sorted(torch.randperm(sites)[:count].tolist())
    image = torch.randn(2, 5, geometry.height, geometry.width).to(dtype)
    weight, bias = torch.randn(7, 5, geometry.kernel, geometry.kernel).to(dtype), torch.randn(7).to(dtype)
    dense = F.conv2d(
        image.double(), weight.double(), bias.double(), geometry.stride, geometry.padding, geometry.dilation
    )
    values = torch.cat([image.flatten(2).mT, torch.zeros(2, 1, 5, dtype=dtype)], 1)
    taps, places = brute_force_patches(geometry, active, size)
    arguments = (values, taps, places, pack_conv_weight(weight), bias, *options(geometry))
    return arguments, dense.flatten(2).mT[:, active]


def pick(sites: int, count: int) -> Tensor:
    """``count`` random sites, ascending."""
    return torch.randperm(sites)[:count].sort().values


def strided(tensor: Tensor) -> Tensor:
    """The same values behind non-contiguous strides, with NaN in the gaps that nobody may read."""
    wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"))
    view = wide[..., ::2]
    view.copy_(tensor)
    return view
