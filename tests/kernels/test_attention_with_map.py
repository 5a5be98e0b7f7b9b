"""Attention whose map is partly a recorded one, against a loop over samples, heads, sites and tokens in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fisedit_compiler.kernels.attention_map import attention_map
from fisedit_compiler.kernels.attention_with_map import attention_with_map
from fisedit_compiler.kernels.cross_attention import cross_attention
from fisedit_compiler.kernels.registry import KernelError
from fisedit_compiler.kernels.tolerances import assert_close
from tests.kernels.triton_tools import poisoned

B, H, S, T, T_BASE, D = 2, 3, 5, 4, 6, 8
COLUMNS = torch.tensor([[0, -1, 5, 1], [-1, -1, 0, 0]])


def operands(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value and a recorded map whose rows add up to one."""
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(B, H, n, D, generator=generator).to(dtype) for n in (S, T, T))
    recorded = torch.randn(B, H, S, T_BASE, generator=generator).softmax(-1).to(dtype)
    return query, key, value, recorded


def written_out(query: Tensor, key: Tensor, recorded: Tensor, columns: Tensor, scale: float) -> Tensor:
    query, key, recorded = query.double(), key.double(), recorded.double()
    out = torch.empty(B, H, S, T, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for s in range(S):
                weights = [math.exp(float(query[b, h, s] @ key[b, h, t]) * scale) for t in range(T)]
                for t in range(T):
                    column = int(columns[b, t])
                    own = weights[t] / sum(weights)
                    out[b, h, s, t] = own if column < 0 else recorded[b, h, s, column]
    return out


@pytest.mark.parametrize("scale", [None, 0.3])
def test_columns_with_an_index_are_the_recorded_ones(scale: float | None, dtype: torch.dtype) -> None:
    query, key, value, recorded = operands(dtype)
    expected = written_out(query, key, recorded, COLUMNS, D**-0.5 if scale is None else scale)
    with poisoned():
        found = attention_map(query, key, scale, recorded, COLUMNS)
        out = attention_with_map(query, key, value, recorded, COLUMNS, scale)
    assert found.dtype == out.dtype == dtype
    assert_close(found, expected, dtype)
    assert torch.equal(found[0, :, :, 2], recorded[0, :, :, 5]), "taken as it is, not scaled to add up to one"
    assert_close(out, expected @ value.double(), dtype)
    assert out.transpose(1, 2).is_contiguous(), "[B, S, h, d] in memory"


def test_without_a_recorded_column_it_is_attention(dtype: torch.dtype) -> None:
    query, key, value, recorded = operands(dtype)
    own = attention_map(query, key)
    assert_close(own.double().sum(-1), torch.ones(B, H, S).double(), dtype)
    none = torch.full_like(COLUMNS, -1)
    assert torch.equal(attention_map(query, key, None, recorded, none), own)
    assert_close(attention_with_map(query, key, value, recorded, none), cross_attention(query, key, value), dtype)


def test_with_the_own_map_it_is_attention(dtype: torch.dtype) -> None:
    query, key, value, _ = operands(dtype)
    own, identity = attention_map(query, key), torch.arange(T).expand(B, T)
    assert_close(attention_with_map(query, key, value, own, identity), cross_attention(query, key, value), dtype)


def test_large_logits_do_not_overflow() -> None:
    query, key, _, _ = operands(torch.float16)
    found = attention_map(query.sign(), key.sign(), 1000.0)
    assert bool(found.isfinite().all()) and found.dtype == torch.float16


def test_operands_that_contradict_each_other_are_refused() -> None:
    query, key, value, recorded = operands()
    with pytest.raises(KernelError, match="belong together"):
        attention_map(query, key, None, recorded)
    with pytest.raises(KernelError, match=r"columns int64 \[B, T\], got 4 dimensions and torch.int32 in 2"):
        attention_map(query, key, None, recorded, COLUMNS.int())
    with pytest.raises(KernelError, match=r"query and key must be \[B, heads, N, d\], got 3 and 4"):
        attention_map(query[0], key)
    with pytest.raises(KernelError, match=r"value must be \[B, heads, T, d\], got 3"):
        attention_with_map(query, key, value[0], recorded, COLUMNS)
