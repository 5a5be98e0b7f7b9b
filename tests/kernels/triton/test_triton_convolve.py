"""The implicit GEMM against the op's reference: in the interpreter on the CPU, for real on a GPU."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fisedit_compiler.geometry.patches import BLOCK_SIZES, patch_shape
from fisedit_compiler.kernels.convolve import gathered
from fisedit_compiler.kernels.tolerances import assert_close
from tests.kernels.triton_tools import poisoned, run_in_the_interpreter

# batch, sites, outputs, channels in, channels out, kernel, stride, dilation
SHAPES = (
    (1, 9, 7, 16, 8, 3, 1, 1),
    (2, 46, 17, 32, 40, 3, 2, 1),
    (2, 5, 1, 4, 20, 3, 1, 2),
    (3, 10, 65, 64, 64, 1, 1, 1),
    (1, 25, 0, 16, 16, 3, 1, 1),
)


def case(shape: tuple[int, ...], size: int, dtype: torch.dtype, device: str, bias: bool) -> list[Any]:
    """Random arguments: patches and places need not come from a plan."""
    batch, sites, outputs, channels, out_channels, side, stride, dilation = shape
    generator = torch.Generator().manual_seed(sum(shape) + size)
    geometry = (side, side), (stride, stride), (dilation, dilation)
    height, width = patch_shape(size, *geometry)
    blocks = outputs if size == 1 else -(-outputs // 3)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def index(limit: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, limit, shape, generator=generator).to(device)

    places = torch.arange(outputs, device=device) if size == 1 else index(max(blocks, 1) * size * size, outputs)
    return [
        values(batch, sites, channels), index(sites, blocks, height * width), places,
        values(out_channels, side * side * channels), values(out_channels) if bias else None, *geometry,
    ]  # fmt: skip


def on_the_cpu(argument: Any) -> Any:
    if not isinstance(argument, torch.Tensor):
        return argument
    return argument.cpu().float() if argument.is_floating_point() else argument.cpu()


def sizes_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    return BLOCK_SIZES if shape[5] > 1 else (1,)


def check(
    shape: tuple[int, ...], size: int, dtype: torch.dtype, device: str, bias: bool, split: int, around: bool
) -> None:
    from fisedit_compiler.kernels.triton.convolve import Surroundings, Tile
    from fisedit_compiler.kernels.triton.convolve import convolve as kernel

    arguments = case(shape, size, dtype, device, bias)
    values, others = on_the_cpu(arguments[0]), [on_the_cpu(argument) for argument in arguments[1:]]
    batch, sites, outputs, channels, out_channels, *_ = shape
    extra = Surroundings()
    if around:
        generator = torch.Generator().manual_seed(1)
        sizes = ((batch, channels), (batch, channels), (batch, out_channels), (batch, outputs, out_channels))
        scale, shift, row_bias, residual = (torch.randn(one, generator=generator).to(device, dtype) for one in sizes)
        rows = sites // 2
        extra = Surroundings(rows, scale, shift, row_bias, residual)
        normalised = F.silu(values * on_the_cpu(scale)[:, None] + on_the_cpu(shift)[:, None])
        # Rounded as the kernel rounds what it hands to the tensor cores.
        values = torch.cat([normalised[:, :rows].to(dtype).float(), values[:, rows:]], 1)
    expected = gathered(values, *others)
    if around:
        expected = expected + on_the_cpu(row_bias)[:, None] + on_the_cpu(residual)
    with poisoned():
        actual = kernel(*arguments, around=extra, tile=Tile(16, 16, 16, split, stages=2))
    assert_close(actual.cpu().float(), expected, dtype)


def test_large_tables_are_read_whole() -> None:
    run_in_the_interpreter("tests.kernels.triton.test_triton_convolve", "large")


def check_many_sites(device: str, dtype: torch.dtype) -> None:
    """Indices that 16 bits do not hold, and one that they just do."""
    from fisedit_compiler.kernels.triton.convolve import convolve as kernel

    for sites in (1 << 15, (1 << 16) - 1, 1 << 17):
        values = torch.randn(1, sites, 4).to(device, dtype)
        taps = (torch.arange(27, device=device) * 37 + sites - 1000).reshape(3, 9)
        weight = torch.randn(16, 36).to(device, dtype)
        arguments = (values, taps, torch.arange(3, device=device), weight, None, (3, 3))
        assert_close(kernel(*arguments).cpu(), gathered(*(on_the_cpu(a) for a in arguments)), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "size"), [(s, size) for s in SHAPES for size in sizes_of(s)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("split", "around"), [(1, False), (3, True), (1, True)])
def test_on_a_gpu(shape: tuple[int, ...], size: int, dtype: torch.dtype, split: int, around: bool) -> None:
    check(shape, size, dtype, "cuda", True, split, around)


@pytest.mark.gpu
def test_large_tables_on_a_gpu() -> None:
    check_many_sites("cuda", torch.float16)


def test_in_the_interpreter() -> None:
    run_in_the_interpreter("tests.kernels.triton.test_triton_convolve")


if __name__ == "__main__":
    import sys

    if sys.argv[1:] == ["large"]:
        check_many_sites("cpu", torch.float32)
    else:
        for shape, split, (bias, around) in product(SHAPES, (1, 3), ((True, True), (True, False), (False, False))):
            for size in sizes_of(shape):
                check(shape, size, torch.float32, "cpu", bias, split, around)
