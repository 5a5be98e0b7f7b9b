"""Few queries against many recorded keys: flash attention with the keys split over programs.

A step at 5 % area has a few hundred queries and thousands of keys, so one program per block of queries would leave
most of the chip idle. The keys are cut into parts (Flash-Decoding, Dao et al. 2023); each program keeps a
running softmax over its part, a second kernel combines the parts. The recorded keys come first, with the active sites
masked out, then the active rows: both are read in order, and the canvas is neither copied nor written. Parts are cut
from the two in a row, so most programs meet only one of them. Where there are
so many queries that torch's own attention is faster although it needs a merged copy, that is what runs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fisedit_compiler.kernels.triton.launching import launch
from fisedit_compiler.kernels.triton.merge_rows import merge_rows


@triton.jit
def _unknown(offs_n, last, table, active, queries, ROWS: tl.constexpr):
    """What is added to the logits of keys ``offs_n``: nothing, or minus infinity for those that do not count."""
    in_n = offs_n < last
    if ROWS:
        # Of rows repeated by padding the last one counts.
        here = tl.load(active + offs_n, mask=in_n, other=0)
        behind = tl.load(active + offs_n + 1, mask=offs_n + 1 < queries, other=-1)
        counts = in_n & (here != behind)
    else:
        counts = in_n & (tl.load(table + offs_n, mask=in_n, other=0) < 0)
    return tl.where(counts, 0.0, float("-inf"))


@triton.jit
def _attend(
    q, keys, values, k_n, v_n, first, last, table, active, queries, acc, largest, total, scale, offs_d, in_d,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Running softmax over keys ``first`` to ``last``: active rows, or recorded sites that are not active."""
    # Loaded one block ahead: these loads are not part of the pipeline that Triton makes of keys and values.
    following = _unknown(first + tl.arange(0, BLOCK_N), last, table, active, queries, ROWS)
    for start in range(first, last, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        unknown = following
        following = _unknown(offs_n + BLOCK_N, last, table, active, queries, ROWS)
        place = offs_n.to(tl.int64)[:, None]
        inside = (offs_n < last)[:, None] & in_d[None, :]
        k = tl.load(keys + place * k_n + offs_d[None, :], mask=inside, other=0.0)  # [BLOCK_N, BLOCK_D]
        # Added, so that masking and scaling are one instruction an element.
        logits = tl.dot(q, tl.trans(k)) * scale + unknown[None, :]  # [BLOCK_M, BLOCK_N], base 2
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        # A part may have met no key yet: keep exp2 away from inf - inf.
        reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = tl.exp2(logits - reference[:, None])
        shrink = tl.exp2(largest - reference)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(values + place * v_n + offs_d[None, :], mask=inside, other=0.0)  # [BLOCK_N, BLOCK_D]
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None])
        largest = new_largest
    return acc, largest, total


# Where in the table of addresses an operand begins differs from layer to layer.
@triton.jit(
    do_not_specialize=["key_entry", "value_entry", "heads", "splits", "rows_start"],
    do_not_specialize_on_alignment=["addresses"],
)
def _attention_sites_kernel(
    query, key, value, key_canvas, value_canvas, addresses, key_entry, value_entry, active, inverse, out, partial,
    stats, scale, heads, queries, sites, rows_start, keys_per_split, splits,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, kc_b, kc_h, kc_n, vc_b, vc_h, vc_n, o_b, o_h, o_n,
    ADDRESSED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    if ADDRESSED:
        key_canvas = tl.load(addresses + key_entry).to(tl.pointer_type(key.dtype.element_ty))
        value_canvas = tl.load(addresses + value_entry).to(tl.pointer_type(value.dtype.element_ty))
        key_canvas = tl.multiple_of(key_canvas, 16)
        value_canvas = tl.multiple_of(value_canvas, 16)
    block = tl.program_id(0)
    group = tl.program_id(1)
    split = tl.program_id(2)
    batch = (group // heads).to(tl.int64)
    head = (group % heads).to(tl.int64)
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    in_m = offs_m < queries
    in_d = offs_d < D
    q = tl.load(
        query + batch * q_b + head * q_h + offs_m.to(tl.int64)[:, None] * q_n + offs_d[None, :],
        mask=in_m[:, None] & in_d[None, :],
        other=0.0,
    )  # [BLOCK_M, BLOCK_D]

    largest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    first = split * keys_per_split
    last = tl.minimum(first + keys_per_split, sites)
    if first < last:
        acc, largest, total = _attend(
            q, key_canvas + batch * kc_b + head * kc_h, value_canvas + batch * vc_b + head * vc_h, kc_n, vc_n,
            first, last, inverse, active, queries, acc, largest, total, scale, offs_d, in_d,
            ROWS=False, BLOCK_N=BLOCK_N,
        )  # fmt: skip
    last = tl.minimum(first + keys_per_split - rows_start, queries)
    first = tl.maximum(first - rows_start, 0)
    if first < last:
        acc, largest, total = _attend(
            q, key + batch * k_b + head * k_h, value + batch * v_b + head * v_h, k_n, v_n,
            first, last, inverse, active, queries, acc, largest, total, scale, offs_d, in_d,
            ROWS=True, BLOCK_N=BLOCK_N,
        )  # fmt: skip

    inside = in_m[:, None] & in_d[None, :]
    if not SPLIT:
        place = batch * o_b + head * o_h + offs_m.to(tl.int64)[:, None] * o_n + offs_d[None, :]
        tl.store(out + place, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)
    else:
        row = (group.to(tl.int64) * splits + split) * queries + offs_m
        tl.store(partial + row[:, None] * D + offs_d[None, :], acc, mask=inside)
        tl.store(stats + row * 2, largest, mask=in_m)
        tl.store(stats + row * 2 + 1, total, mask=in_m)


@triton.jit(do_not_specialize=["heads", "splits"])
def _combine_kernel(
    partial, stats, out, heads, queries, splits, o_b, o_h, o_n,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    group = tl.program_id(1)
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    in_m = offs_m < queries
    inside = in_m[:, None] & (offs_d < D)[None, :]
    largest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for split in range(splits):
        row = (group.to(tl.int64) * splits + split) * queries + offs_m
        part_largest = tl.load(stats + row * 2, mask=in_m, other=0.0)
        part_total = tl.load(stats + row * 2 + 1, mask=in_m, other=1.0)
        part = tl.load(partial + row[:, None] * D + offs_d[None, :], mask=inside, other=0.0)
        new_largest = tl.maximum(largest, part_largest)
        reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        shrink = tl.exp2(largest - reference)
        grow = tl.exp2(part_largest - reference)
        total = total * shrink + part_total * grow
        acc = acc * shrink[:, None] + part * grow[:, None]
        largest = new_largest
    batch = (group // heads).to(tl.int64)
    head = (group % heads).to(tl.int64)
    place = batch * o_b + head * o_h + offs_m.to(tl.int64)[:, None] * o_n + offs_d[None, :]
    tl.store(out + place, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)


def choose_blocks(queries: int, size: int) -> tuple[int, int, int, int]:
    """Query block, key block, warps and stages: the fastest of a sweep on an H200 (``benchmarks/NOTES.md``).

    With 128 keys a block there is one a thread, and Triton loads what masks them once, not once per thread.
    """
    block_m = 64 if queries > 32 else (32 if queries > 16 else 16)
    if size > 128:
        return block_m, 32, 4, 2
    if size > 64:
        return block_m, 64, 4, 3
    if size < 64:
        return (128 if queries > 96 else block_m), 64, 4, 3
    return block_m, 128, 4, 3


def choose_splits(blocks: int, keys: int, processors: int) -> int:
    """Parts of the keys: at most two programs for every processor, no part shorter than 128 keys."""
    return max(min(2 * processors // blocks, keys // SHORTEST), 1)


SHORTEST = 128
"""Keys of a part, at least."""


def prefers_merged(queries: int, sites: int, groups: int, size: int, processors: int) -> bool:
    """Whether torch's attention on merged keys and values is expected to be faster than the kernel here.

    Both times are in microseconds on an H200: the kernel's grows with queries times keys, torch's with the waves of its
    programs (128 queries each) that the processors need, plus the copy at memory bandwidth.
    """
    work = size / 64
    split = 5.0 + 1.0e-6 * queries * (sites + queries) * groups * work
    waves = triton.cdiv(triton.cdiv(queries, 128) * groups, processors)
    merged = 6.0 + 0.009 * waves * sites * work + 4 * 2 * groups * sites * size / 3.5e6
    return merged < split


def attention_sites(
    query: Tensor, key: Tensor, value: Tensor, key_canvas: Tensor, value_canvas: Tensor, active: Tensor,
    inverse: Tensor, scale: float | None = None, *, addresses: Tensor | None = None, entries: tuple[int, int] = (0, 0),
    merged: bool | None = None, splits: int | None = None, config: tuple[int, int, int, int] | None = None,
) -> Tensor:  # fmt: skip
    """The ``fisedit::attention_sites`` op on a GPU; see its reference for shapes.

    Args:
        inverse: int32 ``[S]``: the row of an active site, -1 for others.
        addresses: int64 ``[A]``; when given, the canvases are read at ``addresses[entries]``, and ``key_canvas`` and
            ``value_canvas`` only say their shape and strides.
        merged: forces the choice between torch's attention and the kernel here (tests, tuning).
        splits: asks for this many parts of the keys; there are fewer where whole blocks make fewer.
        config: forces query block, key block, warps and stages.
    """
    batch, heads, queries, size = query.shape
    sites, groups = key_canvas.shape[2], batch * heads
    out = query.new_empty(batch, queries, heads, size).transpose(1, 2)
    if queries == 0:
        return out
    if addresses is None:
        key_canvas, value_canvas = (t if t.stride(-1) == 1 else t.contiguous() for t in (key_canvas, value_canvas))
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    processors = torch.cuda.get_device_properties(query.device).multi_processor_count if query.is_cuda else 1
    if merged is None:
        free = sites > 0 and splits is None and config is None
        merged = free and prefers_merged(queries, sites, groups, size, processors)
    if merged:
        keys = merge_rows(key, key_canvas, inverse, addresses, entries[0])
        values = merge_rows(value, value_canvas, inverse, addresses, entries[1])
        result = F.scaled_dot_product_attention(query, keys, values, scale=scale)
        return result if result.stride() == out.stride() else out.copy_(result)
    block_m, block_n, warps, stages = config or choose_blocks(queries, size)
    block_d = max(triton.next_power_of_2(size), 16)
    blocks = triton.cdiv(queries, block_m)
    # Keys are counted with the active rows behind the canvas, both in whole blocks.
    rows_start = triton.cdiv(sites, block_n) * block_n
    keys = rows_start + queries
    if splits is None:
        splits = choose_splits(blocks * groups, keys, processors)
    keys_per_split = triton.cdiv(triton.cdiv(keys, splits), block_n) * block_n
    splits = triton.cdiv(keys, keys_per_split)
    rows = groups * splits * queries if splits > 1 else 1
    partial = query.new_empty((rows, size), dtype=torch.float32)
    stats = query.new_empty((rows, 2), dtype=torch.float32)
    factor = (1.0 / math.sqrt(size) if scale is None else scale) / math.log(2.0)
    launch(
        _attention_sites_kernel, (blocks, groups, splits),
        query, key, value, key_canvas, value_canvas, inverse if addresses is None else addresses, *entries,
        active, inverse, out, partial, stats,
        factor, heads, queries, sites, rows_start, keys_per_split, splits,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *key_canvas.stride()[:3],
        *value_canvas.stride()[:3], *out.stride()[:3], ADDRESSED=addresses is not None,
        D=size, BLOCK_D=block_d, BLOCK_M=block_m, BLOCK_N=block_n, SPLIT=splits > 1, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if splits > 1:
        combine_m = 16
        launch(
            _combine_kernel, (triton.cdiv(queries, combine_m), groups),
            partial, stats, out, heads, queries, splits, *out.stride()[:3],
            D=size, BLOCK_D=block_d, BLOCK_M=combine_m,
        )  # fmt: skip
    return out
