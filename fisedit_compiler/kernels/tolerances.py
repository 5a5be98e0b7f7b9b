"""One table of tolerances for everything that compares two ways of computing the same thing.

A comparison that needs another number is a sign of a badly conditioned op, not of a tight table: mend the op.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    # (rtol, atol). Eps 2e-16; float64 is for oracles, whose only error is the order of long sums.
    torch.float64: (1e-10, 1e-12),
    # Eps 1.2e-7; reductions over K*C = 1e4 terms in another order, and TF32 off.
    torch.float32: (1e-4, 1e-6),
    # Eps 9.8e-4 (10 bits); one rounding of the inputs' products and one of the result, two more in attention.
    torch.float16: (4e-3, 1e-5),
    # Eps 7.8e-3 (7 bits); the same count of roundings as float16.
    torch.bfloat16: (3e-2, 1e-5),
}


def max_error(actual: Tensor, expected: Tensor) -> float:
    """``max|actual - expected| / max|expected|``, zero for two empty tensors.

    Norm-wise rather than element-wise: an element that cancels to near zero keeps the error of its terms.
    """
    if expected.numel() == 0:
        return 0.0
    difference = (actual.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    return difference / scale if scale else difference


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Assert that two tensors agree as far as ``dtype``, the precision of the computation, lets them.

    Raises:
        AssertionError: shapes differ, a value is not finite where the other is, or the error exceeds
            ``atol + rtol * max|expected|``.
    """
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    rtol, atol = TOLERANCES[dtype]
    actual64, expected64 = actual.double(), expected.double()
    difference = (actual64 - expected64).abs().max().item()
    bound = atol + rtol * expected64.abs().max().item()
    # Written so that NaN fails.
    assert difference <= bound, f"max error {difference:.3e} exceeds {bound:.3e} for {dtype}"
