"""A recorded canvas with its active sites replaced, written once; ``index_copy`` would copy first and then write."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fisedit_compiler.kernels.triton.launching import launch

BLOCK_SITES = 64


@triton.jit(do_not_specialize=["entry", "heads"], do_not_specialize_on_alignment=["addresses"])
def _merge_rows_kernel(
    rows, canvas, addresses, entry, inverse, out, heads, sites,
    r_b, r_h, r_n, c_b, c_h, c_n, o_b, o_h, o_n,
    ADDRESSED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SITES: tl.constexpr,
):  # fmt: skip
    if ADDRESSED:
        canvas = tl.multiple_of(tl.load(addresses + entry).to(tl.pointer_type(rows.dtype.element_ty)), 16)
    group = tl.program_id(1)
    batch = (group // heads).to(tl.int64)
    head = (group % heads).to(tl.int64)
    offs_s = tl.program_id(0) * BLOCK_SITES + tl.arange(0, BLOCK_SITES)  # [BLOCK_SITES]
    offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    in_s = offs_s < sites
    row = tl.load(inverse + offs_s, mask=in_s, other=-1).to(tl.int64)
    is_new = (row >= 0)[:, None]
    inside = in_s[:, None] & (offs_d < D)[None, :]
    site = offs_s.to(tl.int64)
    new = tl.load(
        rows + batch * r_b + head * r_h + row[:, None] * r_n + offs_d[None, :], mask=inside & is_new, other=0.0
    )  # [BLOCK_SITES, BLOCK_D]
    old = tl.load(
        canvas + batch * c_b + head * c_h + site[:, None] * c_n + offs_d[None, :], mask=inside & (row < 0)[:, None],
        other=0.0,
    )  # fmt: skip
    place = out + batch * o_b + head * o_h + site[:, None] * o_n + offs_d[None, :]
    tl.store(place, tl.where(is_new, new, old), mask=inside)


def merge_rows(
    rows: Tensor, canvas: Tensor, inverse: Tensor, addresses: Tensor | None = None, entry: int = 0
) -> Tensor:
    """``canvas`` ``[B, h, S, d]`` with row ``inverse[s]`` of ``rows`` ``[B, h, N, d]`` where that is not negative.

    Args:
        rows: the new rows; their last axis is contiguous.
        canvas: the recorded values, likewise.
        inverse: int32 ``[S]``, see ``inverse_table``.
        addresses: int64; when given, the canvas is read at ``addresses[entry]`` and ``canvas`` only says its layout.
        entry: which address.

    Returns:
        ``[B, h, S, d]``, laid out in memory as ``[B, S, h, d]``.
    """
    batch, heads, sites, size = canvas.shape
    out = rows.new_empty(batch, sites, heads, size).transpose(1, 2)
    block_d = triton.next_power_of_2(size)
    launch(
        _merge_rows_kernel, (triton.cdiv(sites, BLOCK_SITES), batch * heads),
        rows, canvas, inverse if addresses is None else addresses, entry, inverse, out, heads, sites,
        *rows.stride()[:3], *canvas.stride()[:3], *out.stride()[:3],
        ADDRESSED=addresses is not None, D=size, BLOCK_D=block_d, BLOCK_SITES=BLOCK_SITES,
    )  # fmt: skip
    return out
