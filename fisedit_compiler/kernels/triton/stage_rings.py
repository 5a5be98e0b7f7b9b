"""Bring the ring rows of many recorded canvases to their places in one launch.

Fifty separate gathers would cost more launches than the rest of a call's preparation. Every job is one canvas, found
in a table of addresses, and one ring; a program copies a block of rows of one job and one batch entry.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fisedit_compiler.kernels.triton.launching import launch

BLOCK_ROWS = 16
BLOCK_CHANNELS = 256


@triton.jit
def _stage_rings_kernel(
    addresses, jobs, ELEMENT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr
):  # fmt: skip
    job = tl.program_id(0)
    block = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    source = tl.load(addresses + tl.load(jobs + job * 6)).to(tl.pointer_type(ELEMENT))
    target = tl.load(jobs + job * 6 + 1).to(tl.pointer_type(ELEMENT))
    ring = tl.load(jobs + job * 6 + 2).to(tl.pointer_type(tl.int64))
    rows = tl.load(jobs + job * 6 + 3)
    sites = tl.load(jobs + job * 6 + 4)
    channels = tl.load(jobs + job * 6 + 5)
    offs_r = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    in_r = offs_r < rows
    site = tl.load(ring + offs_r, mask=in_r, other=0)
    read = source + (batch * sites + site) * channels
    write = target + (batch * rows + offs_r) * channels
    for start in range(0, channels, BLOCK_CHANNELS):
        offs_c = start + tl.arange(0, BLOCK_CHANNELS)  # [BLOCK_CHANNELS]
        inside = in_r[:, None] & (offs_c < channels)[None, :]
        values = tl.load(read[:, None] + offs_c[None, :], mask=inside)  # [BLOCK_ROWS, BLOCK_CHANNELS]
        tl.store(write[:, None] + offs_c[None, :], values, mask=inside)


_ELEMENTS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class RingStager:
    """Copies ring rows of canvases into fixed buffers: made once per CUDA graph, captured into it."""

    def __init__(
        self, targets: Sequence[Tensor], entries: Sequence[int], rings: Sequence[Tensor], sites: Sequence[int]
    ) -> None:
        """``targets[i]`` ``[B, R_i, C_i]`` gets ``canvas_i[:, rings[i]]``; canvases are contiguous ``[B, S_i, C_i]``.

        ``entries[i]`` is where in the table the canvas is found. All targets have one dtype; ``rings[i]`` (int64
        ``[R_i]``) is read whenever the kernel runs, so it may be filled anew.
        """
        self.targets, self.rings = tuple(targets), tuple(rings)
        jobs = [
            [entry, target.data_ptr(), ring.data_ptr(), target.shape[1], count, target.shape[2]]
            for target, entry, ring, count in zip(targets, entries, rings, sites, strict=True)
        ]
        self.jobs = torch.tensor(jobs, dtype=torch.int64, device=targets[0].device)
        blocks = triton.cdiv(max(target.shape[1] for target in targets), BLOCK_ROWS)
        self.grid = (len(jobs), blocks, targets[0].shape[0])
        self.element = _ELEMENTS[targets[0].dtype]

    def run(self, addresses: Tensor) -> None:
        """Copy from the canvases that are in the table now."""
        launch(
            _stage_rings_kernel, self.grid,
            addresses, self.jobs, ELEMENT=self.element, BLOCK_ROWS=BLOCK_ROWS, BLOCK_CHANNELS=BLOCK_CHANNELS,
        )  # fmt: skip
