"""Ops that sum over rows or attend among them: rows that padding repeated count once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fisedit_compiler.kernels.attention_rows import attention_rows
from fisedit_compiler.kernels.attention_sites import attention_sites
from fisedit_compiler.kernels.padding import counting_rows
from fisedit_compiler.kernels.tolerances import assert_close
from fisedit_compiler.kernels.update_statistics import update_statistics
from tests.kernels.triton_tools import poisoned, run_in_the_interpreter


def padded(rows: Tensor, axis: int, count: int) -> Tensor:
    """``rows`` with the last entry along ``axis`` repeated ``count`` times."""
    last = rows.narrow(axis, rows.shape[axis] - 1, 1)
    return torch.cat([rows, *[last] * count], dim=axis)


@pytest.mark.parametrize(
    ("active", "expected"), [([], []), ([5], [1]), ([1, 4, 9], [1, 1, 1]), ([1, 9, 9, 9], [1, 0, 0, 1])]
)
def test_the_last_row_of_a_site_counts(active: list[int], expected: list[int]) -> None:
    assert counting_rows(torch.tensor(active, dtype=torch.int64)).tolist() == [bool(item) for item in expected]


@pytest.mark.parametrize("count", [1, 7])
def test_statistics(count: int) -> None:
    active = torch.tensor([0, 3, 4, 8, 11, 15, 21][:count])
    rows, statistics, sums = torch.randn(2, count, 12), torch.rand(2, 4, 2), torch.randn(2, 24, 4, 2)
    expected = update_statistics(rows, statistics, sums, active)
    actual = update_statistics(padded(rows, 1, 5), statistics, sums, padded(active, 0, 5))
    assert_close(actual, expected, torch.float32)


def check_attention(kernel_on: str | None, dtype: torch.dtype, count: int, extra: int) -> None:
    """Attention among rows is attention over a canvas of these sites alone."""
    generator = torch.Generator().manual_seed(count)
    query, key, value = (torch.randn(2, count, 3, 16, generator=generator).transpose(1, 2) for _ in range(3))
    active = torch.arange(0, 3 * count, 3)
    expected = attention_sites(query, key, value, key, value, torch.arange(count))
    rows = [padded(t, 2, extra) for t in (query, key, value)]
    if kernel_on is None:
        actual = attention_rows(*rows, padded(active, 0, extra))
    else:
        from fisedit_compiler.kernels.triton.attention_sites import attention_sites as kernel

        given = [t.to(kernel_on, dtype) for t in rows]
        nothing = [t[:, :, :0] for t in given[1:]]
        inverse = torch.empty(0, dtype=torch.int32, device=kernel_on)
        with poisoned():
            actual = kernel(*given, *nothing, padded(active, 0, extra).to(kernel_on), inverse)
    assert actual.transpose(1, 2).is_contiguous()
    assert_close(actual[:, :, :count].cpu().float(), expected, dtype)


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("extra", [0, 3])
def test_attention_among_rows(count: int, extra: int) -> None:
    check_attention(None, torch.float32, count, extra)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 130])
def test_on_a_gpu(dtype: torch.dtype, count: int) -> None:
    check_attention("cuda", dtype, count, 3)


def test_in_the_interpreter() -> None:
    run_in_the_interpreter("tests.kernels.test_padding")


if __name__ == "__main__":
    for count in (1, 70):
        check_attention("cpu", torch.float32, count, 3)
