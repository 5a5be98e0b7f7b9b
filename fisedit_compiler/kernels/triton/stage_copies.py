"""Copy many tensors to fixed places in one launch; where they come from is read in a table of addresses.

A call of a CUDA graph brings a hundred tensors along, from bytes to megabytes; ``torch._foreach_copy_`` needs
dozens of launches for them and reaches a tenth of the memory bandwidth. Here every block of 16-bit words of every
tensor is one program, looked up in a list made once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fisedit_compiler.kernels.addresses import ALIGNMENT, WORD
from fisedit_compiler.kernels.triton.launching import launch

BLOCK = 4096


@triton.jit
def _stage_copies_kernel(addresses, jobs, blocks, BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    job = tl.load(blocks + program * 2)
    start = tl.load(blocks + program * 2 + 1)
    entry = tl.load(jobs + job * 3)
    source = tl.multiple_of(tl.load(addresses + entry).to(tl.pointer_type(tl.int16)), ALIGNMENT)
    target = tl.multiple_of(tl.load(jobs + job * 3 + 1).to(tl.pointer_type(tl.int16)), ALIGNMENT)
    count = tl.load(jobs + job * 3 + 2)
    place = start + tl.arange(0, BLOCK)  # [BLOCK]
    inside = place < count
    tl.store(target + place, tl.load(source + place, mask=inside), mask=inside)


class CopyStager:
    """Copies tensors into fixed buffers of the same strides: made once per CUDA graph, captured into it."""

    def __init__(self, targets: Sequence[Tensor], entries: Sequence[int]) -> None:
        """``targets`` are plain (see ``is_plain``); ``entries[i]`` is where in the table the source of one is found."""
        device = targets[0].device
        words = [target.nbytes // WORD for target in targets]
        blocks = [(job, start) for job, count in enumerate(words) for start in range(0, count, BLOCK)]
        jobs = [(entry, target.data_ptr(), count) for entry, target, count in zip(entries, targets, words, strict=True)]
        self.targets = tuple(targets)
        self.jobs = torch.tensor(jobs, dtype=torch.int64, device=device)
        self.blocks = torch.tensor(blocks, dtype=torch.int64, device=device)

    def run(self, addresses: Tensor) -> None:
        """Copy; every source is plain and has the dtype, shape and strides of its target."""
        launch(
            _stage_copies_kernel, (len(self.blocks),),
            addresses, self.jobs, self.blocks, BLOCK=BLOCK, ALIGNMENT=ALIGNMENT,
        )  # fmt: skip
