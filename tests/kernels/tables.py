"""Index tables and inputs for the kernel tests, built independently of the package's site plans."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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


def pick(sites: int, count: int) -> Tensor:
    """``count`` random sites, ascending."""
    return torch.randperm(sites)[:count].sort().values


def strided(tensor: Tensor) -> Tensor:
    """The same values behind non-contiguous strides, with NaN in the gaps that nobody may read."""
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"), dtype=tensor.dtype)
    view = wide[..., ::2]
    view.copy_(tensor)
    return view
