"""``gather_sites`` and ``scatter_sites`` are inverse on the active sites and exact everywhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisedit_compiler.kernels.gather_sites import gather_sites
from fisedit_compiler.kernels.registry import KernelError
from fisedit_compiler.kernels.scatter_sites import scatter_sites
from tests.kernels.tables import pick, strided


@pytest.mark.parametrize("count", [0, 1, 5, 12])
@pytest.mark.parametrize("dim", [1, 2, -1])
@pytest.mark.parametrize("use_strides", [False, True])
def test_gather_and_scatter(count: int, dim: int, use_strides: bool, dtype: torch.dtype) -> None:
    active = pick(12, count)
    canvas = torch.randn(12, 12, 12).to(dtype)
    rows = torch.randn(12, 12, 12).to(dtype).narrow(dim, 0, count)
    if use_strides:
        canvas, rows = strided(canvas), strided(rows)
    before = canvas.clone()

    gathered = gather_sites(canvas, active, dim)
    assert gathered.is_contiguous()
    assert torch.equal(gathered, torch.stack([canvas.select(dim, i) for i in active], dim) if count else rows)

    scattered = scatter_sites(rows, canvas, active, dim)
    assert scattered.is_contiguous() and torch.equal(canvas, before)
    assert torch.equal(gather_sites(scattered, active, dim), rows)
    others = torch.tensor([site for site in range(12) if site not in active.tolist()], dtype=torch.int64)
    assert torch.equal(gather_sites(scattered, others, dim), gather_sites(canvas, others, dim))


@given(sites=st.integers(1, 20), share=st.floats(0, 1))
def test_scattering_what_was_gathered_changes_nothing(sites: int, share: float) -> None:
    canvas, active = torch.randn(2, sites, 3), pick(sites, round(share * sites))
    assert torch.equal(scatter_sites(gather_sites(canvas, active, 1), canvas, active, 1), canvas)


def test_full_gather_is_a_copy() -> None:
    canvas = torch.randn(1, 4, 2)
    assert gather_sites(canvas, torch.arange(4), 1).data_ptr() != canvas.data_ptr()


def test_rows_of_another_dtype_are_refused() -> None:
    with pytest.raises(KernelError, match="same dtype"):
        scatter_sites(torch.randn(1, 2, 3).half(), torch.randn(1, 4, 3), torch.arange(2), 1)
