"""The copy stager against plain copies: in the interpreter on the CPU, for real on a GPU."""

from __future__ import annotations

import pytest
import torch

from fisedit_compiler.kernels.addresses import address_table, is_plain
from tests.kernels.triton_tools import run_in_the_interpreter

# Bytes to more than a block, in several dtypes; the last is dense in another order of axes.
SHAPES = ((1,), (2, 3, 5), (4097,), (2, 8192), (7, 1, 9))
DTYPES = (torch.float32, torch.float16, torch.int64, torch.bfloat16, torch.float32)


def check(device: str) -> None:
    from fisedit_compiler.kernels.triton.stage_copies import CopyStager

    targets = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in zip(SHAPES, DTYPES, strict=True)]
    targets.append(torch.empty(3, 40, 6, device=device).transpose(1, 2))
    assert all(map(is_plain, targets))
    entries = [3, 1, 0, 5, 2, 4]
    stager = CopyStager(targets, entries)
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        sources = [
            torch.empty_like(target).copy_(torch.randn(target.shape, generator=generator) * 9) for target in targets
        ]
        ordered = [sources[entries.index(entry)] for entry in range(len(entries))]
        stager.run(address_table(ordered, torch.device(device)))
        for source, target in zip(sources, targets, strict=True):
            assert torch.equal(source, target) and source.stride() == target.stride()


def test_what_can_be_copied_word_by_word() -> None:
    plain = torch.zeros(4, 6, 8)
    assert is_plain(plain) and is_plain(plain.permute(2, 0, 1)) and is_plain(plain[:, :1, :1].contiguous())
    assert not is_plain(plain[:, :3]) and not is_plain(plain[:1].expand(4, 6, 8)), "gaps and repeats"
    assert not is_plain(plain.flatten()[1:]), "not aligned"
    assert not is_plain(plain[:0]) and not is_plain(torch.zeros(3, dtype=torch.uint8)), "no whole words"


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    check("cuda")


def test_in_the_interpreter() -> None:
    run_in_the_interpreter("tests.kernels.triton.test_triton_stage_copies")


if __name__ == "__main__":
    check("cpu")
