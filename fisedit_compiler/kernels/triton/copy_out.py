"""Copy many tensors from fixed places to a few new ones in one launch, whose addresses are arguments of the launch.

The other way round of ``stage_copies.py``: what a CUDA graph returns lies in its own memory, and an edit that is
recorded returns two hundred tensors, of which padded rows are left out. A copy of each would be a launch of each, and a
table of addresses would have to be uploaded at every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fisedit_compiler.kernels.addresses import ALIGNMENT, TARGETS, WORD, Runs
from fisedit_compiler.kernels.triton.launching import Pointer, launch

BLOCK = 2048


@triton.jit
def _copy_out_kernel(
    jobs, blocks, t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15,
    BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    job = tl.load(blocks + program * 2)
    start = tl.load(blocks + program * 2 + 1)
    number = tl.load(jobs + job * 4)
    address = tl.load(jobs + job * 4 + 1)
    address += tl.where(number == 0, t0, 0) + tl.where(number == 1, t1, 0)
    address += tl.where(number == 2, t2, 0) + tl.where(number == 3, t3, 0)
    address += tl.where(number == 4, t4, 0) + tl.where(number == 5, t5, 0)
    address += tl.where(number == 6, t6, 0) + tl.where(number == 7, t7, 0)
    address += tl.where(number == 8, t8, 0) + tl.where(number == 9, t9, 0)
    address += tl.where(number == 10, t10, 0) + tl.where(number == 11, t11, 0)
    address += tl.where(number == 12, t12, 0) + tl.where(number == 13, t13, 0)
    address += tl.where(number == 14, t14, 0) + tl.where(number == 15, t15, 0)
    target = tl.multiple_of(address.to(tl.pointer_type(tl.int16)), ALIGNMENT)
    source = tl.multiple_of(tl.load(jobs + job * 4 + 2).to(tl.pointer_type(tl.int16)), ALIGNMENT)
    count = tl.load(jobs + job * 4 + 3)
    place = start + tl.arange(0, BLOCK)  # [BLOCK]
    inside = place < count
    tl.store(target + place, tl.load(source + place, mask=inside), mask=inside)


class CopyOut:
    """Copies views of fixed tensors to new tensors; made once per graph and number of rows."""

    def __init__(self, views: Sequence[Tensor], runs: Sequence[Runs], places: Sequence[tuple[int, int]]) -> None:
        """``runs`` are those of the views, whose elements have whole words.

        ``places`` says where the runs of each view go, one behind the other: in which target, of at most ``TARGETS``,
        and at what byte of it.
        """
        self.device = views[0].device
        jobs = np.concatenate(
            [
                _jobs(view, of_view, number, first)
                for view, of_view, (number, first) in zip(views, runs, places, strict=True)
            ]
        )
        aligned = not (jobs[:, 1:3] % ALIGNMENT).any()
        self.alignment = ALIGNMENT if aligned else WORD
        per_job = -(-jobs[:, 3] // BLOCK)
        first_block = np.cumsum(per_job) - per_job
        job = np.repeat(np.arange(len(jobs)), per_job)
        blocks = np.stack([job, (np.arange(len(job)) - first_block[job]) * BLOCK], axis=1)
        self.jobs, self.blocks = self._uploaded(jobs), self._uploaded(blocks)

    def _uploaded(self, table: np.ndarray) -> Tensor:
        host = torch.from_numpy(np.ascontiguousarray(table, dtype=np.int64))
        return host.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else host

    def run(self, targets: Sequence[Tensor]) -> None:
        """Copy to targets, which are aligned and large enough."""
        addresses = [target.data_ptr() for target in targets]
        # As many arguments at every launch; nobody reads those behind the last target.
        addresses += addresses[:1] * (TARGETS - len(addresses))
        _launch(len(self.blocks), self.jobs, self.blocks, addresses, self.alignment)


def rehearse() -> None:
    """Launch what copies will, where launches are noted. What is copied may be aligned or not, targets are."""
    table = Pointer(torch.int64, 0)
    for alignment in (ALIGNMENT, WORD):
        _launch(1, table, table, [_SOMEWHERE] * TARGETS, alignment)


_SOMEWHERE = 1 << 40
"""Stands for the address of a target: no 32 bits hold it."""


def _launch(programs: int, jobs: Any, blocks: Any, addresses: Sequence[int], alignment: int) -> None:
    launch(_copy_out_kernel, (programs,), jobs, blocks, *addresses, BLOCK=BLOCK, ALIGNMENT=alignment)


def _jobs(view: Tensor, runs: Runs, target: int, first: int) -> np.ndarray:
    """A line per run: the target, the byte of it, the source's address, words."""
    size = view.element_size()
    starts = np.asarray(runs.starts, dtype=np.int64)
    jobs = np.empty((len(starts), 4), dtype=np.int64)
    jobs[:, 0] = target
    jobs[:, 1] = first + np.arange(len(starts)) * runs.length * size
    jobs[:, 2] = view.data_ptr() + starts * size
    jobs[:, 3] = runs.length * size // WORD
    return jobs
