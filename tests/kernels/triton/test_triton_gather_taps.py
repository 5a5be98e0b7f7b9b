"""The gather through taps against its reference: in the interpreter on the CPU, for real on a GPU."""

from __future__ import annotations

import pytest
import torch

from fisedit_compiler.kernels.gather_taps import gather_taps
from tests.kernels.triton_tools import poisoned, run_in_the_interpreter

# batch, sites, channels, outputs, taps
SHAPES = (
    (1, 7, 16, 5, 9),
    (2, 33, 320, 17, 9),
    (2, 4, 4, 1, 9),
    (3, 65, 64, 31, 1),
    (2, 9, 130, 12, 4),
    (1, 3, 8, 0, 9),
)


def check(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    from fisedit_compiler.kernels.triton.gather_taps import gather_taps as kernel

    batch, sites, channels, outputs, taps = shape
    generator = torch.Generator().manual_seed(sum(shape))
    values = torch.randn(batch, sites, channels, generator=generator).to(device, dtype)
    index = torch.randint(0, sites, (outputs, taps), generator=generator).to(device)
    for given, table in ((values, index), (values.mT.contiguous().mT, index.t().contiguous().t())):
        with poisoned():
            actual = kernel(given, table)
        assert torch.equal(actual.cpu(), gather_taps(values.cpu(), index.cpu()))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(shape, dtype, "cuda")


def test_in_the_interpreter() -> None:
    run_in_the_interpreter("tests.kernels.triton.test_triton_gather_taps")


if __name__ == "__main__":
    for shape in SHAPES:
        check(shape, torch.float32, "cpu")
