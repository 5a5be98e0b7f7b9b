"""Copy many tensors to fixed places in one launch.

A call of a CUDA graph brings a few hundred tensors along, from bytes to megabytes; ``torch._foreach_copy_`` needs
dozens of launches for them and reaches a tenth of the memory bandwidth. Here every block of 16-bit words of every
tensor is one program, looked up in a table made once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fisedit_compiler.kernels.triton.addresses import Addresses

BLOCK = 8192
WORD = 2  # bytes; every dtype of a recording has whole words


@triton.jit
def _stage_copies_kernel(sources, targets, words, blocks, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    job = tl.load(blocks + program * 2)
    start = tl.load(blocks + program * 2 + 1)
    count = tl.load(words + job)
    source = tl.multiple_of(tl.load(sources + job).to(tl.pointer_type(tl.int16)), 16)
    target = tl.multiple_of(tl.load(targets + job).to(tl.pointer_type(tl.int16)), 16)
    place = start + tl.arange(0, BLOCK)  # [BLOCK]
    inside = place < count
    tl.store(target + place, tl.load(source + place, mask=inside), mask=inside)


class CopyStager:
    """Copies tensors into fixed buffers of the same strides: made once per CUDA graph, run once per call."""

    def __init__(self, targets: Sequence[Tensor]) -> None:
        """``targets`` are dense (no gaps, in whatever order of axes)."""
        device = targets[0].device
        words = [target.nbytes // WORD for target in targets]
        table = [(job, start) for job, count in enumerate(words) for start in range(0, count, BLOCK)]
        self.targets = tuple(targets)
        self.target_addresses = torch.tensor([target.data_ptr() for target in targets], device=device)
        self.words = torch.tensor(words, device=device)
        self.blocks = torch.tensor(table, dtype=torch.int64, device=device)
        self.sources = Addresses(len(targets), device)

    def run(self, sources: Sequence[Tensor]) -> None:
        """Copy; every source has the dtype and shape of its target (one in another order of axes is copied twice)."""
        if len(self.blocks):
            plain = [_as_target(source, target) for source, target in zip(sources, self.targets, strict=True)]
            _stage_copies_kernel[(len(self.blocks),)](
                self.sources.upload(plain), self.target_addresses, self.words, self.blocks, BLOCK=BLOCK
            )


def _as_target(source: Tensor, target: Tensor) -> Tensor:
    if source.stride() == target.stride() and source.data_ptr() % 16 == 0:
        return source
    return torch.empty_like(target).copy_(source)


def can_stage(tensor: Tensor) -> bool:
    """Whether a tensor can be copied word by word: dense, of whole words and aligned."""
    if tensor.nbytes % WORD or tensor.data_ptr() % 16 or not tensor.numel():
        return False
    axes = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    expected = 1
    for stride, size in axes:
        if stride != expected:
            return False
        expected *= size
    return True
