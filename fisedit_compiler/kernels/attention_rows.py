"""``fisedit::attention_rows``: self-attention of the active sites among themselves."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fisedit_compiler.kernels.formulas import attention_flops
from fisedit_compiler.kernels.padding import counting_rows
from fisedit_compiler.kernels.providers import Provider, half_precision
from fisedit_compiler.kernels.registry import define_op, require
from fisedit_compiler.kernels.traits import OpTraits

_NAME = "attention_rows"


def _check(query: Tensor) -> None:
    require(
        query.dim() == 4,
        _NAME,
        lambda: f"query must be [B, heads, N, d], got {query.dim()} dims; split the heads first",
    )


def _reference(query: Tensor, key: Tensor, value: Tensor, active: Tensor, scale: float | None = None) -> Tensor:
    _check(query)
    counting = counting_rows(active)
    # Without padding every row counts, and attention without a mask is faster. Asking a GPU would wait for it.
    mask = None if active.is_cpu and bool(counting.all()) else counting[None, None, None, :]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    # [B, N, h, d] in memory: what flash kernels write, and the next projection reads without a copy.
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _fake(query: Tensor, key: Tensor, value: Tensor, active: Tensor, scale: float | None = None) -> Tensor:
    _check(query)
    batch, heads, count, _ = query.shape
    return query.new_empty(batch, count, heads, value.shape[3]).transpose(1, 2)


@cache
def _triton() -> Callable[..., Tensor]:
    """Triton is there only where a GPU is; looked up once, since an import statement takes a microsecond each time."""
    from fisedit_compiler.kernels.triton.attention_sites import attention_sites

    return attention_sites


def _cuda(query: Tensor, key: Tensor, value: Tensor, active: Tensor, scale: float | None = None) -> Tensor:
    _check(query)
    # The same kernel, on a canvas without sites.
    nothing = (key[:, :, :0], value[:, :, :0])
    return _triton()(query, key, value, *nothing, active, active.new_empty(0, dtype=torch.int32), scale)


_OP = define_op(
    f"{_NAME}(Tensor query, Tensor key, Tensor value, Tensor active, float? scale=None) -> Tensor",
    _reference,
    _fake,
    traits=OpTraits(flops=attention_flops, reads_whole=True),
    providers=[Provider("triton", "CUDA", _cuda, half_precision)],
)


def attention_rows(query: Tensor, key: Tensor, value: Tensor, active: Tensor, scale: float | None = None) -> Tensor:
    """Attention of the active sites over the active sites: ``attention="active"``.

    Args:
        query: active rows ``[B, h, N, d]``.
        key: active rows ``[B, h, N, d]``.
        value: active rows ``[B, h, N, d]``.
        active: int64 ``[N]``, ascending; of rows of one site, as padding makes them, only one counts.
        scale: factor of the logits, ``1 / sqrt(d)`` if ``None``.

    Returns:
        ``[B, h, N, d]``, laid out in memory as ``[B, N, h, d]``.

    Raises:
        KernelError: a tensor does not have four dimensions.
    """
    return _OP(query, key, value, active, scale)
