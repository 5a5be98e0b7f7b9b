"""The comparison that all kernel tests rely on must itself fail when it should."""

from __future__ import annotations

import pytest
import torch

from fisedit_compiler.kernels.tolerances import TOLERANCES, assert_close, max_error


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_rounding_passes_and_ten_tolerances_fail(dtype: torch.dtype) -> None:
    expected = torch.randn(1000, dtype=torch.float64)
    assert_close(expected.to(dtype), expected, dtype)
    wrong = expected.clone()
    wrong[3] += 10 * (TOLERANCES[dtype][0] * expected.abs().max() + TOLERANCES[dtype][1])
    with pytest.raises(AssertionError, match="max error"):
        assert_close(wrong, expected, dtype)


def test_nan_and_wrong_shapes_fail() -> None:
    with pytest.raises(AssertionError, match="max error"):
        assert_close(torch.tensor([float("nan"), 1.0]), torch.ones(2), torch.float32)
    with pytest.raises(AssertionError, match="shape"):
        assert_close(torch.ones(2), torch.ones(1, 2), torch.float32)


def test_empty_tensors_are_equal() -> None:
    assert_close(torch.ones(0, 3), torch.ones(0, 3), torch.float16)
    assert max_error(torch.ones(0), torch.ones(0)) == 0
    assert max_error(torch.ones(2), torch.zeros(2)) == 1
