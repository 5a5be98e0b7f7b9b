"""``attention_sites`` against a softmax written out over the patched keys and values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fisedit_compiler.kernels.attention_sites import attention_sites
from fisedit_compiler.kernels.registry import KernelError
from fisedit_compiler.kernels.tolerances import assert_close
from tests.kernels.tables import pick, strided


def _expected(tensors: list[Tensor], active: Tensor, scale: float | None) -> Tensor:
    query, key, value, keys, values = (tensor.double() for tensor in tensors)
    keys, values = keys.index_copy(2, active, key), values.index_copy(2, active, value)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    return torch.softmax(query @ keys.transpose(-1, -2) * factor, dim=-1) @ values


@pytest.mark.parametrize("count", [0, 1, 7, 20])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("use_strides", [False, True])
def test_equals_dense_attention_at_active_sites(
    count: int, scale: float | None, use_strides: bool, dtype: torch.dtype
) -> None:
    active = pick(20, count)
    tensors = [torch.randn(2, 3, n, 8).to(dtype) for n in (count, count, count, 20, 20)]
    expected = _expected(tensors, active, scale)
    if use_strides:
        tensors = [strided(tensor) for tensor in tensors]
    before = [tensor.clone() for tensor in tensors]
    actual = attention_sites(*tensors, active, scale)
    assert actual.dtype == dtype
    assert actual.transpose(1, 2).is_contiguous()
    assert_close(actual, expected, dtype)
    assert all(torch.equal(tensor, was) for tensor, was in zip(tensors, before, strict=True))


def test_heads_split_by_views() -> None:
    active = pick(20, 5)
    tensors = [torch.randn(2, n, 3 * 8).view(2, n, 3, 8).transpose(1, 2) for n in (5, 5, 5, 20, 20)]
    assert_close(attention_sites(*tensors, active), _expected(tensors, active, None), torch.float32)


def test_unsplit_heads_are_refused() -> None:
    x = torch.randn(1, 4, 8)
    with pytest.raises(KernelError, match="split the heads"):
        attention_sites(x, x, x, x, x, torch.arange(4))
