"""Comparing what kinds of slots give on an example, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fisedit_compiler.kernels.tolerances import TOLERANCES

ULPS = 4
"""Steps of a dtype that a value may change by without its kind saying that it rounds."""


def form_of(value: Tensor | Sequence[int], dtype: torch.dtype | None = None) -> str:
    """Dtype and shape in words."""
    shape = value.shape if isinstance(value, Tensor) else value
    dtype = value.dtype if isinstance(value, Tensor) else dtype
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def problem_of(found: Tensor, right: Tensor, *, rounding: float = 0.0, exact: bool = False, loose: bool = False) -> str:
    """What is wrong with a value, in words; empty if nothing is.

    Args:
        found: the value.
        right: what it should be.
        rounding: relative error, of the largest element, that is no fault.
        exact: whether every bit counts.
        loose: whether the values are computed in two ways: they may differ as far as their precision lets them.
    """
    if found.shape != right.shape or (exact and found.dtype != right.dtype):
        return f"it is {form_of(found)} where {form_of(right)} is due"
    if not right.numel():
        return ""
    first, second = (value if value.is_complex() else value.double() for value in (found, right))
    error, largest = float((first - second).abs().max()), float(second.abs().max())
    allowed = 0.0
    if not exact:
        steps = [ULPS * torch.finfo(each.dtype).eps for each in (found, right) if each.dtype.is_floating_point]
        computed = [TOLERANCES.get(each.dtype, (0.0, 0.0))[0] for each in (found, right)] if loose else []
        allowed = max([0.0, rounding, *steps, *computed]) * largest
    if error <= allowed:
        return ""
    share = error / largest if largest else math.inf
    return f"the largest error is {share:.2g} of the largest element" if math.isfinite(share) else "some are no numbers"
