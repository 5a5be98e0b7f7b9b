"""The Triton convolution against its reference: in the interpreter on the CPU, for real on a GPU."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from fisedit_compiler.kernels import conv2d_sites
from fisedit_compiler.kernels.tolerances import assert_close
from tests.kernels.triton_tools import poisoned, run_in_the_interpreter

# batch, rows in, ring, canvas, outputs, taps, in channels, out channels
SHAPES = (
    (1, 5, 3, 16, 7, 9, 16, 8),
    (2, 33, 12, 64, 17, 9, 32, 40),
    (2, 0, 4, 9, 1, 9, 4, 20),
    (3, 1, 0, 9, 65, 1, 64, 64),
    (1, 16, 8, 30, 0, 9, 16, 16),
)


def case(shape: tuple[int, ...], dtype: torch.dtype, device: str, bias: bool) -> tuple[torch.Tensor | None, ...]:
    batch, count, ring_size, canvas_size, outputs, taps, channels, out_channels = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def values(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    ring = torch.randperm(canvas_size, generator=generator)[:ring_size].to(device)
    index = torch.randint(0, count + ring_size + 1, (outputs, taps), generator=generator).to(device)
    return (
        values(batch, count, channels), values(batch, canvas_size, channels), ring, index,
        values(taps * channels, out_channels), values(out_channels) if bias else None,
    )  # fmt: skip


def check(shape: tuple[int, ...], dtype: torch.dtype, device: str, bias: bool, split: int) -> None:
    from fisedit_compiler.kernels.triton.conv2d_sites import Tile
    from fisedit_compiler.kernels.triton.conv2d_sites import conv2d_sites as kernel

    arguments = case(shape, dtype, device, bias)
    expected = conv2d_sites(
        *(None if a is None else a.cpu().float() if a.is_floating_point() else a.cpu() for a in arguments)
    )
    with poisoned():
        actual = kernel(*arguments, tile=Tile(16, 16, 16, split, stages=2))
    assert_close(actual.cpu().float(), expected, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("split", [1, 3])
def test_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype, split: int) -> None:
    check(shape, dtype, "cuda", True, split)


def test_in_the_interpreter() -> None:
    run_in_the_interpreter("tests.kernels.test_triton_conv2d_sites")


if __name__ == "__main__":
    for shape, bias, split in product(SHAPES, (True, False), (1, 3)):
        check(shape, torch.float32, "cpu", bias, split)
