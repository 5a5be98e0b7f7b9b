"""Copy many tensors from fixed places to new ones in one launch; where they go is read in a table of addresses.

The other way round of ``stage_copies.py``: what a CUDA graph returns lies in its own memory, and an edit that is
recorded returns two hundred tensors, of which padded rows are left out. A copy of each would be a launch of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fisedit_compiler.kernels.addresses import ALIGNMENT, WORD, Runs, address_table, uploaded

BLOCK = 2048


@triton.jit
def _copy_out_kernel(addresses, jobs, blocks, BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    job = tl.load(blocks + program * 2)
    start = tl.load(blocks + program * 2 + 1)
    entry = tl.load(jobs + job * 4)
    offset = tl.load(jobs + job * 4 + 1)
    target = tl.multiple_of((tl.load(addresses + entry) + offset).to(tl.pointer_type(tl.int16)), ALIGNMENT)
    source = tl.multiple_of(tl.load(jobs + job * 4 + 2).to(tl.pointer_type(tl.int16)), ALIGNMENT)
    count = tl.load(jobs + job * 4 + 3)
    place = start + tl.arange(0, BLOCK)  # [BLOCK]
    inside = place < count
    tl.store(target + place, tl.load(source + place, mask=inside), mask=inside)


class CopyOut:
    """Copies views of fixed tensors to new tensors; made once per graph and mask."""

    def __init__(self, views: Sequence[Tensor], runs: Sequence[Runs]) -> None:
        """``runs`` are those of the views, whose elements have whole words."""
        self.device = views[0].device
        jobs: list[tuple[int, int, int, int]] = []
        for entry, (view, of_view) in enumerate(zip(views, runs, strict=True)):
            size, first = view.element_size(), view.data_ptr()
            length = of_view.length * size
            jobs += [
                (entry, number * length, first + start * size, length // WORD)
                for number, start in enumerate(of_view.starts)
            ]
        aligned = all(offset % ALIGNMENT == source % ALIGNMENT == 0 for _, offset, source, _ in jobs)
        self.alignment = ALIGNMENT if aligned else WORD
        self.jobs = uploaded(jobs, self.device)
        blocks = [(job, start) for job, (*_, count) in enumerate(jobs) for start in range(0, count, BLOCK)]
        self.blocks = uploaded(blocks, self.device)

    def run(self, targets: Sequence[Tensor]) -> None:
        """Copy; the targets have the shapes of the views and the strides of their runs, and are aligned."""
        addresses = address_table(targets, self.device)
        _copy_out_kernel[(len(self.blocks),)](
            addresses, self.jobs, self.blocks, BLOCK=BLOCK, ALIGNMENT=self.alignment
        )  # fmt: skip
