"""Comparing values bit for bit, and telling which are numbers at all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
OVERFLOW_REMEDY = (
    "In half precision that is an overflow nearly always: run the model in another type (pipe.to(torch.bfloat16) or "
    "torch.float32), upcast what overflows (pipe.upcast_vae(), or a VAE made for float16), or lower the guidance scale"
)


def differs(first: Tensor, second: Tensor) -> Tensor:
    """Where two tensors of one type have other bits, bool in their common shape: a NaN is equal to itself."""
    integer = _INTEGERS.get(first.element_size())
    if first.dtype != second.dtype or integer is None or not first.is_floating_point():
        return first != second
    return first.view(integer) != second.view(integer)


def any_not_finite(values: Any) -> Tensor | None:
    """Whether a floating point tensor among ``values`` holds NaN or infinity: bool with one element, on the device."""
    flags = [~torch.isfinite(value).all() for value in _tensors(values) if value.is_floating_point()]
    return torch.stack(flags).any() if flags else None


def _tensors(values: Any) -> Iterable[Tensor]:
    return (value for value in values if isinstance(value, Tensor))
