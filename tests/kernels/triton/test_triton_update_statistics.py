"""Statistics corrected by rows, and the sums of the rows, against float64: in the interpreter, for real on a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fisedit_compiler.kernels.addresses import address_table
from fisedit_compiler.kernels.tolerances import assert_close
from tests.kernels.tables import pick, strided
from tests.kernels.triton_tools import poisoned, run_in_the_interpreter

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# batch, groups, channels of a group, sites, rows, rows that padding repeats
SHAPES = (
    (2, 4, 10, 600, 520, 9),
    (1, 3, 60, 100, 16, 0),
    (2, 2, 80, 36, 1, 15),
    (2, 4, 20, 30, 0, 0),
    (3, 5, 7, 90, 65, 3),
    (1, 1, 700, 50, 40, 1),
    (1, 2, 10, 3000, 2816, 0),
)
LARGE = (
    (2, 32, 10, 9216, 461, 19),
    (2, 32, 30, 9216, 461, 19),
    (2, 32, 80, 576, 29, 3),
    (2, 32, 30, 9216, 2816, 0),
    (2, 32, 10, 9216, 9216, 0),
)


def expected(rows: Tensor, statistics: Tensor, site_sums: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Both results in float64, site by site."""
    batch, count, channels = rows.shape
    groups = statistics.shape[1]
    mean, variance = statistics.double().unbind(-1)
    centred = rows.double().reshape(batch, count, groups, channels // groups) - mean[:, None, :, None]
    sums = torch.stack([centred.sum(-1), centred.square().sum(-1)], -1)
    row_of = {site: row for row, site in enumerate(active.tolist())}
    change = sums[:, list(row_of.values())].sum(1) - site_sums.double()[:, list(row_of)].sum(1)
    shift, spread = (change / (site_sums.shape[1] * (channels // groups))).unbind(-1)
    return torch.stack([mean + shift, (variance + spread - shift.square()).clamp(min=0)], -1), sums


def check(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, *, seed: int = 0, offset: float = 0.0, tile: object = None
) -> None:
    from fisedit_compiler.kernels.triton.update_statistics import update_statistics as kernel

    batch, groups, per_group, sites, count, repeated = shape
    torch.manual_seed(seed)
    base = (torch.randn(batch, sites, groups, per_group) * 2 + offset).to(dtype).double()
    mean = base.mean((1, 3))
    statistics = torch.stack([mean, base.var((1, 3), correction=0)], -1).float()
    centred = base - statistics[:, None, :, :1].double()
    site_sums = torch.stack([centred.sum(-1), centred.square().sum(-1)], -1).float()
    active = pick(sites, count)
    rows = (torch.randn(batch, count, groups * per_group) + offset).to(dtype)
    rows = torch.cat([rows, *[rows[:, -1:]] * repeated], 1)
    active = torch.cat([active, *[active[-1:]] * repeated])
    updated, sums = expected(rows, statistics, site_sums, active)
    wide = torch.cat([rows, rows.flip(2)], 2)  # rows may be a part of wider ones
    recorded = [value.to(device) for value in (statistics, site_sums, active)]
    for given_rows in (rows, wide[:, :, : rows.shape[2]], rows.mT.contiguous().mT):
        with poisoned():
            actual, actual_sums = kernel(given_rows.to(device), *recorded, sums=True, tile=tile)
        assert actual.dtype == actual_sums.dtype == torch.float32
        assert_close(actual.cpu(), updated, torch.float32)
        assert_close(actual_sums.cpu(), sums, torch.float32)
    rows = rows.to(device)
    first = kernel(rows, *recorded, sums=True, tile=tile)
    alone, nothing = kernel(rows, *recorded, sums=False, tile=tile)
    # Another kernel, whose compiler may add up in another order.
    assert_close(alone, first[0], torch.float32)
    assert not nothing.numel()
    at = strided(recorded[1])
    table = address_table([recorded[0], at], torch.device(device))
    addressed = kernel(rows, recorded[0], at, recorded[2], sums=True, addresses=table, entry=1, tile=tile)
    assert all(map(torch.equal, addressed, first))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype, offset: float) -> None:
    check(shape, dtype, "cuda", offset=offset)


@pytest.mark.gpu
def test_repeated_calls_give_the_same_bits() -> None:
    """Also in a CUDA graph: nothing depends on which program ends first, and nothing is left over from a replay."""
    from fisedit_compiler.kernels.triton.update_statistics import update_statistics as kernel

    rows = torch.randn(2, 2816, 960, device="cuda", dtype=torch.float16)
    statistics, site_sums = torch.rand(2, 32, 2, device="cuda"), torch.randn(2, 9216, 32, 2, device="cuda")
    active = torch.arange(0, 3 * 2816, 3, device="cuda")
    first = kernel(rows, statistics, site_sums, active, sums=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = kernel(rows, statistics, site_sums, active, sums=True)
    for _ in range(20):
        graph.replay()
        assert all(map(torch.equal, replayed, first))


def test_tiles() -> None:
    pytest.importorskip("triton")
    from fisedit_compiler.kernels.triton.update_statistics import MAX_SPLITS, choose_tile

    for count in (0, 1, 16, 120, 480):
        for per_group in (10, 20, 30, 40, 60, 80):
            assert choose_tile(2, 32, per_group, count, 132).splits == 1 or count * per_group > 20_000
    many = choose_tile(2, 32, 10, 2816, 132)
    assert 1 < many.splits <= MAX_SPLITS and many.groups == 4


def test_in_the_interpreter() -> None:
    run_in_the_interpreter("tests.kernels.triton.test_triton_update_statistics")


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 2), groups=st.integers(1, 6), per_group=st.integers(1, 20), sites=st.integers(1, 70),
    part=st.floats(0, 1), repeated=st.integers(0, 5), dtype=st.sampled_from(DTYPES), offset=st.floats(-20, 20),
    rows=st.sampled_from([1, 4, 16]), together=st.sampled_from([1, 2, 4]), splits=st.integers(1, 5),
    seed=st.integers(0, 99),
)  # fmt: skip
def any_shape(
    batch: int, groups: int, per_group: int, sites: int, part: float, repeated: int, dtype: torch.dtype,
    offset: float, rows: int, together: int, splits: int, seed: int,
) -> None:  # fmt: skip
    """Run by ``test_in_the_interpreter``."""
    from fisedit_compiler.kernels.triton.update_statistics import Tile

    count = round(part * sites)
    shape = (batch, groups, per_group, sites, count, repeated if count else 0)
    check(shape, dtype, "cpu", seed=seed, offset=offset, tile=Tile(rows, together, splits, 4))


if __name__ == "__main__":
    for shape in SHAPES:
        check(shape, torch.float32, "cpu", offset=3.0)
    any_shape()
