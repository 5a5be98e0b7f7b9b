"""Comparing values bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def differs(first: Tensor, second: Tensor) -> Tensor:
    """Where two tensors of one type have other bits, bool in their common shape: a NaN is equal to itself."""
    integer = _INTEGERS.get(first.element_size())
    if first.dtype != second.dtype or integer is None or not first.is_floating_point():
        return first != second
    return first.view(integer) != second.view(integer)
