"""``fisedit::attention_sites``: self-attention of active queries against recorded keys and values."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch.nn.functional as F
from torch import Tensor

from fisedit_compiler.geometry.inverse_table import inverse_table
from fisedit_compiler.kernels.formulas import canvas_attention_flops
from fisedit_compiler.kernels.providers import Provider, half_precision
from fisedit_compiler.kernels.registry import define_op, require
from fisedit_compiler.kernels.traits import OpTraits, Update

_NAME = "attention_sites"


def _check(query: Tensor, key_canvas: Tensor, value_canvas: Tensor) -> None:
    require(
        query.dim() == 4 and key_canvas.dim() == 4 and value_canvas.dim() == 4,
        _NAME,
        lambda: (
            f"query and canvases must be [B, heads, sites, d], got {query.dim()}, {key_canvas.dim()} and "
            f"{value_canvas.dim()} dimensions; split the heads first"
        ),
    )


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_canvas: Tensor,
    value_canvas: Tensor,
    active: Tensor,
    scale: float | None = None,
    inverse: Tensor | None = None,
) -> Tensor:
    _check(query, key_canvas, value_canvas)
    keys = key_canvas.index_copy(2, active, key)
    values = value_canvas.index_copy(2, active, value)
    out = F.scaled_dot_product_attention(query, keys, values, scale=scale)
    # [B, N, h, d] in memory: what flash kernels write, and the next projection reads without a copy.
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_canvas: Tensor,
    value_canvas: Tensor,
    active: Tensor,
    scale: float | None = None,
    inverse: Tensor | None = None,
) -> Tensor:
    _check(query, key_canvas, value_canvas)
    batch, heads, count, _ = query.shape
    return query.new_empty(batch, count, heads, value_canvas.shape[3]).transpose(1, 2)


@cache
def _triton() -> Callable[..., Tensor]:
    """Triton is there only where a GPU is; looked up once, since an import statement takes a microsecond each time."""
    from fisedit_compiler.kernels.triton.attention_sites import attention_sites

    return attention_sites


def _cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_canvas: Tensor,
    value_canvas: Tensor,
    active: Tensor,
    scale: float | None = None,
    inverse: Tensor | None = None,
) -> Tensor:
    if inverse is None:
        inverse = inverse_table(active, key_canvas.shape[2])
    return _triton()(query, key, value, key_canvas, value_canvas, active, inverse, scale)


OP = define_op(
    f"{_NAME}(Tensor query, Tensor key, Tensor value, Tensor key_canvas, Tensor value_canvas, Tensor active, "
    "float? scale=None, Tensor? inverse=None) -> Tensor",
    _reference,
    _fake,
    traits=OpTraits(
        flops=canvas_attention_flops,
        reads_whole=True,
        updates=(Update(recorded=3, new=1), Update(recorded=4, new=2)),
    ),
    providers=[Provider("triton", "CUDA", _cuda, half_precision)],
)


def attention_sites(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_canvas: Tensor,
    value_canvas: Tensor,
    active: Tensor,
    scale: float | None = None,
    inverse: Tensor | None = None,
) -> Tensor:
    """Attention of the active sites over all sites, where only the active keys and values are new.

    Args:
        query: active rows ``[B, h, N, d]``.
        key: active rows ``[B, h, N, d]``.
        value: active rows ``[B, h, N, d]``.
        key_canvas: recorded keys ``[B, h, S, d]``; not mutated.
        value_canvas: recorded values ``[B, h, S, d]``; not mutated.
        active: int64 ``[N]``, where in the canvases the rows belong.
        scale: factor of the logits, ``1 / sqrt(d)`` if ``None``.
        inverse: ``inverse_table(active, S)``; says nothing new, but saves GPU kernels from making it.

    Returns:
        ``[B, h, N, d]``, laid out in memory as ``[B, N, h, d]``.

    Raises:
        KernelError: a tensor does not have four dimensions.
    """
    return OP(query, key, value, key_canvas, value_canvas, active, scale, inverse)
