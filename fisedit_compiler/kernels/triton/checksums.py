"""Checksums of many tensors in one launch: every byte is read once, and its place counts.

The sum over 32-bit words of ``word * mix(place)`` modulo 2**64: whole numbers, so that the order of additions does not
matter and the result is the same at every run. A changed bit, sign or order changes it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fisedit_compiler.kernels.triton.launching import launch

CHUNK = 1 << 16
"""Words that one program reads."""
BLOCK = 2048


@triton.jit
def _checksum_kernel(addresses, lengths, owners, firsts, sums, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    owner = tl.load(owners + program)
    first = tl.load(firsts + program)
    length = tl.load(lengths + owner)
    words = tl.load(addresses + owner).to(tl.pointer_type(tl.int32))
    total = tl.zeros([BLOCK], dtype=tl.int64)
    for start in range(0, CHUNK, BLOCK):
        place = first + start + tl.arange(0, BLOCK).to(tl.int64)  # [BLOCK]
        word = tl.load(words + place, mask=place < length, other=0).to(tl.int64)
        mixed = (place + 1) * -7046029254386353131
        mixed = mixed ^ (mixed >> 29)
        total += (word + 0x1F123BB5) * (mixed | 1) * (place < length).to(tl.int64)
    tl.atomic_add(sums + owner, tl.sum(total, axis=0))


class Checksums:
    """Checksums of the same tensors time and again: where they lie is written down once.

    Args:
        tensors: dense, one-dimensional, on one CUDA device, and kept there. The last bytes of one whose size is no
            multiple of four bytes are read apart.

    Source: multiply-shift hashing (Dietzfelbinger et al., 1997), summed.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.device = tensors[0].device
        lengths = [tensor.nbytes // 4 for tensor in tensors]
        chunks = [(number, first) for number, length in enumerate(lengths) for first in range(0, length, CHUNK)]

        def table(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device="cpu").to(self.device)

        self._addresses, self._lengths = table([tensor.data_ptr() for tensor in tensors]), table(lengths)
        self._owners, self._firsts = table([owner for owner, _ in chunks]), table([first for _, first in chunks])
        self._count, self._programs = len(tensors), len(chunks)
        self._rests = [
            (number, tensor.view(torch.uint8)[-rest:])
            for number, tensor in enumerate(tensors)
            if (rest := tensor.nbytes % 4)
        ]

    def __call__(self) -> Tensor:
        """Checksum of every tensor: int64 ``[len(tensors)]`` on their device."""
        sums = torch.zeros(self._count, dtype=torch.int64, device=self.device)
        if self._programs:
            with torch.cuda.device(self.device):
                launch(
                    _checksum_kernel, (self._programs,),
                    self._addresses, self._lengths, self._owners, self._firsts, sums, CHUNK=CHUNK, BLOCK=BLOCK,
                )  # fmt: skip
        for number, rest in self._rests:
            factors = torch.arange(len(rest), device=self.device) * 2 + 3
            sums[number] += (rest.long() * factors).sum() * 1_000_003
        return sums


def checksums(tensors: list[Tensor]) -> Tensor:
    """Checksum of every tensor, as :class:`Checksums` gives it, once."""
    return Checksums(tensors)()
