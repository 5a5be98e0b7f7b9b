"""The GroupNorm ops against ``torch.nn.functional.group_norm`` of the dense map."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fisedit_compiler.kernels.addresses import address_table
from fisedit_compiler.kernels.group_norm_row_sums import group_norm_row_sums
from fisedit_compiler.kernels.group_norm_site_sums import group_norm_site_sums
from fisedit_compiler.kernels.group_norm_sites import group_norm_sites
from fisedit_compiler.kernels.group_norm_statistics import group_norm_statistics
from fisedit_compiler.kernels.registry import KernelError
from fisedit_compiler.kernels.tolerances import assert_close
from fisedit_compiler.kernels.update_statistics import update_statistics
from fisedit_compiler.kernels.update_statistics_addressed import update_statistics_addressed
from tests.kernels.tables import pick, strided

EPS = 1e-5


def _rows(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("spatial", [(6, 5), (1, 1), (30,)], ids=str)
def test_statistics_are_mean_and_biased_variance(groups: int, spatial: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(2, 8, *spatial) + 3).to(dtype)
    actual = group_norm_statistics(x, groups)
    grouped = x.double().reshape(2, groups, -1)
    expected = torch.stack([grouped.mean(-1), grouped.var(-1, correction=0)], -1)
    assert actual.dtype == torch.float32
    assert_close(actual, expected, torch.float32)
    # Other strides may sum in another order.
    assert_close(group_norm_statistics(strided(x), groups), expected, torch.float32)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("count", [0, 1, 7, 30])
def test_rows_normalised_with_dense_statistics_are_group_norm(affine: bool, count: int, dtype: torch.dtype) -> None:
    x = (torch.randn(2, 8, 6, 5) * 2 + 1).to(dtype)
    weight, bias = (torch.randn(8).to(dtype), torch.randn(8).to(dtype)) if affine else (None, None)
    active = pick(30, count)
    expected = F.group_norm(
        x.double(),
        4,
        None if weight is None else weight.double(),
        None if bias is None else bias.double(),
        EPS,
    )
    statistics = group_norm_statistics(x, 4)
    # Indexing a transposed map leaves the rows non-contiguous.
    rows = _rows(x)[:, active]
    actual = group_norm_sites(rows, statistics, weight, bias, 4, EPS)
    assert actual.dtype == dtype and actual.is_contiguous()
    assert_close(actual, _rows(expected)[:, active], dtype)
    assert torch.equal(group_norm_sites(strided(rows), statistics, weight, bias, 4, EPS), actual)


def test_weight_without_bias_and_bias_without_weight() -> None:
    x, weight = torch.randn(1, 8, 3, 3), torch.randn(8)
    statistics = group_norm_statistics(x, 2)
    for pair in [(weight, None), (None, weight)]:
        actual = group_norm_sites(_rows(x), statistics, *pair, 2, EPS)
        assert_close(actual, _rows(F.group_norm(x.double(), 2, *_doubled(pair), EPS)), torch.float32)


def _doubled(pair: tuple[Tensor | None, Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.double() for tensor in pair]


def test_site_sums_add_up_to_the_statistics(dtype: torch.dtype) -> None:
    x = (torch.randn(2, 8, 6, 5) + 100).to(dtype)
    statistics = group_norm_statistics(x, 4)
    sums = group_norm_site_sums(x, statistics, 4)
    assert sums.shape == (2, 30, 4, 2) and sums.dtype == torch.float32 and sums.is_contiguous()
    centred = x.double().reshape(2, 4, 2, 30) - statistics[:, :, 0, None, None].double()
    expected = torch.stack([centred.sum(2), centred.square().sum(2)], -1).transpose(1, 2)
    assert_close(sums, expected, torch.float32)
    assert_close(sums.sum(1)[..., 1] / 60, statistics[..., 1], torch.float32)
    assert torch.equal(group_norm_site_sums(strided(x), statistics, 4), sums)


@pytest.mark.parametrize("count", [0, 1, 7, 30])
def test_sums_of_rows_are_those_of_their_sites(count: int, dtype: torch.dtype) -> None:
    x, active = (torch.randn(2, 8, 6, 5) + 100).to(dtype), pick(30, count)
    statistics = group_norm_statistics(x, 4)
    rows = _rows(x)[:, active]
    sums = group_norm_row_sums(rows, statistics)
    assert sums.shape == (2, count, 4, 2) and sums.dtype == torch.float32 and sums.is_contiguous()
    assert_close(sums, group_norm_site_sums(x, statistics, 4)[:, active], torch.float32)
    assert torch.equal(group_norm_row_sums(strided(rows), statistics), sums)


@pytest.mark.parametrize("count", [0, 1, 7, 30])
def test_updated_statistics_are_those_of_the_patched_map(count: int, dtype: torch.dtype) -> None:
    base, active = (torch.randn(2, 8, 6, 5) + 5).to(dtype), pick(30, count)
    rows = (torch.randn(2, count, 8) * 3 - 2).to(dtype)
    _compare_update(base, rows, active)


@given(count=st.integers(0, 16), offset=st.floats(-50, 50), scale=st.floats(0.1, 10))
def test_update_is_well_conditioned(count: int, offset: float, scale: float) -> None:
    base = torch.randn(1, 4, 4, 4) + offset
    rows = torch.randn(1, count, 4) * scale + offset
    _compare_update(base, rows, pick(16, count))


def _compare_update(base: Tensor, rows: Tensor, active: Tensor) -> None:
    statistics = group_norm_statistics(base, 2)
    sums = group_norm_site_sums(base, statistics, 2)
    actual = update_statistics(rows, statistics, sums, active)
    patched = _rows(base.double()).index_copy(1, active, rows.double()).transpose(1, 2)
    grouped = patched.reshape(base.shape[0], 2, -1)
    assert_close(actual[..., 0], grouped.mean(-1), torch.float32)
    assert_close(actual[..., 1], grouped.var(-1, correction=0), torch.float32)
    assert torch.equal(update_statistics(strided(rows), statistics, strided(sums), active), actual)
    for at in (sums, strided(sums)):
        addresses = address_table([rows, at], torch.device("cpu"))
        for kept in (True, False):
            there = update_statistics_addressed(rows, statistics, at, active, addresses, 1, kept)
            assert torch.equal(there[0], actual)
            assert torch.equal(there[1], group_norm_row_sums(rows if kept else rows[:, :0], statistics))


def test_variance_never_falls_below_zero() -> None:
    base = torch.full((1, 2, 2, 2), 1e4)
    base[0, 0, 0, 0] = 1e4 + 1
    statistics = group_norm_statistics(base, 1)
    sums = group_norm_site_sums(base, statistics, 1)
    updated = update_statistics(torch.full((1, 4, 2), 1e4), statistics, sums, torch.arange(4))
    assert (updated[..., 1] >= 0).all()


def test_wrong_groups_are_refused() -> None:
    x, statistics = torch.randn(1, 8, 2, 2), torch.zeros(1, 4, 2)
    with pytest.raises(KernelError, match="groups=3"):
        group_norm_statistics(x, 3)
    with pytest.raises(KernelError, match="groups=3"):
        group_norm_site_sums(x, statistics, 3)
    with pytest.raises(KernelError, match="statistics of this GroupNorm"):
        group_norm_sites(torch.randn(1, 2, 8), statistics, None, None, 2, EPS)
    with pytest.raises(KernelError, match="same GroupNorm"):
        group_norm_row_sums(torch.randn(1, 2, 6), statistics)
    with pytest.raises(KernelError, match="got 2 dimensions"):
        group_norm_row_sums(torch.randn(2, 8), statistics)
    with pytest.raises(KernelError, match=r"addressed: .* same GroupNorm"):
        given = (torch.randn(1, 2, 8), statistics, torch.zeros(1, 4, 2, 2), torch.arange(2), torch.zeros(1).long())
        update_statistics_addressed(*given, 0, True)
    with pytest.raises(KernelError, match="same GroupNorm"):
        update_statistics(torch.randn(1, 2, 8), statistics, torch.zeros(1, 4, 2, 2), torch.arange(2))
