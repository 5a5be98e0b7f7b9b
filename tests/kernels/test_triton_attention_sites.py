"""The Triton attention against its reference: in the interpreter on the CPU, for real on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fisedit_compiler.kernels import attention_sites
from fisedit_compiler.kernels.attention_sites import inverse_table
from fisedit_compiler.kernels.tolerances import assert_close

# batch, heads, active, sites, size of a head, splits
SHAPES = (
    (1, 2, 5, 70, 16, 1),
    (2, 1, 33, 200, 40, 3),
    (1, 3, 1, 130, 64, 2),
    (2, 2, 64, 64, 32, 1),
    (1, 1, 0, 9, 16, 1),
)


def check(shape: tuple[int, ...], dtype: torch.dtype, device: str, padding: int = 0) -> None:
    from fisedit_compiler.kernels.triton.attention_sites import attention_sites as kernel

    batch, heads, count, sites, size, splits = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def tokens(length: int) -> torch.Tensor:  # [B, h, length, d] as a projection leaves it
        values = torch.randn(batch, length, heads, size, generator=generator)
        return values.to(device, dtype).transpose(1, 2)

    rows = [tokens(count) for _ in range(3)]
    canvases = [tokens(sites) for _ in range(2)]
    active = torch.randperm(sites, generator=generator)[:count].sort().values
    expected = attention_sites(*(t.cpu().float() for t in (*rows, *canvases)), active)
    if padding and count:  # repeated rows must not count twice
        active = torch.cat([active, active[-1:].expand(padding)])
        rows = [torch.cat([t, t[:, :, -1:].expand(-1, -1, padding, -1)], dim=2) for t in rows]
    inverse = inverse_table(active, sites)
    actual = kernel(*rows, *canvases, active.to(device), inverse.to(device), splits=splits)[:, :, :count]
    assert_close(actual.cpu().float(), expected, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(shape, dtype, "cuda")
    check(shape, dtype, "cuda", padding=3)


def test_in_the_interpreter() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.test_triton_attention_sites"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]


if __name__ == "__main__":
    for shape in SHAPES:
        for padding in (0, 3):
            check(shape, torch.float32, "cpu", padding)
