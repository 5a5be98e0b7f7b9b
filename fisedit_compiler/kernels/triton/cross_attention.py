"""Attention to so few keys that one program holds them all: one softmax, no loop over keys.

A text has 77 keys. Flash kernels are made for long rows of keys: at a few hundred queries they take twice the time
(``benchmarks/NOTES.md``).
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from fisedit_compiler.kernels.triton.launching import launch


@triton.jit(do_not_specialize=["heads", "keys"])
def _cross_attention_kernel(
    query, key, value, out, scale, heads, queries, keys,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    group = tl.program_id(1)
    batch = (group // heads).to(tl.int64)
    head = (group % heads).to(tl.int64)
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    offs_n = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    in_d = (offs_d < D)[None, :]
    in_m = (offs_m < queries)[:, None] & in_d
    in_n = (offs_n < keys)[:, None] & in_d
    rows = offs_m.to(tl.int64)[:, None]
    q = tl.load(query + batch * q_b + head * q_h + rows * q_n + offs_d[None, :], mask=in_m, other=0.0)
    k = tl.load(key + batch * k_b + head * k_h + offs_n[:, None] * k_n + offs_d[None, :], mask=in_n, other=0.0)
    v = tl.load(value + batch * v_b + head * v_h + offs_n[:, None] * v_n + offs_d[None, :], mask=in_n, other=0.0)
    logits = tl.dot(q, tl.trans(k)) * scale  # [BLOCK_M, BLOCK_N], base 2
    logits = tl.where((offs_n < keys)[None, :], logits, float("-inf"))
    weights = tl.exp2(logits - tl.max(logits, 1)[:, None])
    total = tl.sum(weights, 1)
    mean = tl.dot(weights.to(v.dtype), v) / total[:, None]  # [BLOCK_M, BLOCK_D]
    place = batch * o_b + head * o_h + rows * o_n + offs_d[None, :]
    tl.store(out + place, mean.to(out.dtype.element_ty), mask=in_m)


def choose_blocks(queries: int, size: int) -> tuple[int, int]:
    """Queries a program and warps: the fastest of a sweep on an H200 (``benchmarks/NOTES.md``)."""
    if size > 64:
        return 16, 4
    if size & (size - 1):
        return 32, 4
    return (64 if queries > 48 else 16), 4


def cross_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, *, config: tuple[int, int] | None = None
) -> Tensor:
    """The ``fisedit::cross_attention`` op on a GPU, for 1 to 128 keys; see its reference for shapes.

    Args:
        config: forces queries a program and warps.
    """
    batch, heads, queries, size = query.shape
    keys = key.shape[2]
    out = query.new_empty(batch, queries, heads, size).transpose(1, 2)
    if queries == 0:
        return out
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    block_m, warps = config or choose_blocks(queries, size)
    factor = (1.0 / math.sqrt(size) if scale is None else scale) / math.log(2.0)
    launch(
        _cross_attention_kernel, (triton.cdiv(queries, block_m), batch * heads),
        query, key, value, out, factor, heads, queries, keys,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
        D=size, BLOCK_D=max(triton.next_power_of_2(size), 16), BLOCK_M=block_m,
        BLOCK_N=max(triton.next_power_of_2(keys), 16), num_warps=warps,
    )  # fmt: skip
    return out
