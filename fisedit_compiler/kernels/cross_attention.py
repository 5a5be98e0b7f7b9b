"""``fisedit::cross_attention``: attention of the active sites to a text, or to anything else that has no sites."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fisedit_compiler.kernels.addresses import is_plain
from fisedit_compiler.kernels.formulas import attention_flops
from fisedit_compiler.kernels.providers import ROUNDED, Provider
from fisedit_compiler.kernels.registry import define_op, require
from fisedit_compiler.kernels.traits import OpTraits

_NAME = "cross_attention"
FEW_KEYS = 128
"""As many keys as one program of the GPU kernel holds at once."""
LARGEST_SIZE = 256
"""Of a head, that the GPU kernel takes."""
_MANY_KEYS = f"one program holds all keys, 1 to {FEW_KEYS}"
_OTHER_SIZE = f"queries and values must be of one size, {LARGEST_SIZE} at most"


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    require(
        query.dim() == 4 and key.dim() == 4 and value.dim() == 4,
        _NAME,
        lambda: (
            f"query, key and value must be [B, heads, N, d], got {query.dim()}, {key.dim()} and {value.dim()} "
            "dimensions; split the heads first"
        ),
    )
    require(
        key.shape[:3] == value.shape[:3] and key.shape[:2] == query.shape[:2] and key.shape[3] == query.shape[3],
        _NAME,
        lambda: (
            f"query {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)} must have one batch and "
            "number of heads, keys and values one length, queries and keys one size; expand what is shared"
        ),
    )


def _reference(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    _check(query, key, value)
    out = F.scaled_dot_product_attention(query, key, value, scale=scale)
    # [B, N, h, d] in memory: what flash kernels write, and the next projection reads without a copy.
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _fake(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    _check(query, key, value)
    batch, heads, count, _ = query.shape
    return query.new_empty(batch, count, heads, value.shape[3]).transpose(1, 2)


def _supports(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Literal[True] | str:
    _check(query, key, value)
    size, keys = query.shape[3], key.shape[2]
    if query.dtype not in (torch.float16, torch.bfloat16):
        return ROUNDED
    if not 0 < keys <= FEW_KEYS:
        return _MANY_KEYS
    return _OTHER_SIZE if value.shape[3] != size or size > LARGEST_SIZE else True


@cache
def _triton() -> Callable[..., Tensor]:
    """Triton is there only where a GPU is; looked up once, since an import statement takes a microsecond each time."""
    from fisedit_compiler.kernels.triton.cross_attention import cross_attention

    return cross_attention


def _few_keys(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    return _triton()(query, key, value, scale)


def _any_strides(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    return _reference(_for_torch(query), _for_torch(key), _for_torch(value), scale)


def _for_torch(tensor: Tensor) -> Tensor:
    """``tensor`` in a form that all of torch's own kernels take.

    They may load what lies between the rows of a cut-out tensor, and ``0 * NaN`` is NaN. The one for float32 refuses
    unaligned strides even of axes with one element, which ``contiguous()`` leaves as they are.
    """
    aligned = all(stride % 8 == 0 for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size == 1)
    return tensor if is_plain(tensor) and aligned else tensor.clone(memory_format=torch.contiguous_format)


_OP = define_op(
    f"{_NAME}(Tensor query, Tensor key, Tensor value, float? scale=None) -> Tensor",
    _reference,
    _fake,
    traits=OpTraits(flops=attention_flops, reads_whole=True),
    providers=[Provider("triton", "CUDA", _few_keys, _supports), Provider("torch", "CUDA", _any_strides)],
)


def cross_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Attention of rows to keys and values that have no sites.

    Args:
        query: active rows ``[B, h, N, d]``.
        key: ``[B, h, T, d]``, of a text for example.
        value: ``[B, h, T, d]``.
        scale: factor of the logits, ``1 / sqrt(d)`` if ``None``.

    Returns:
        ``[B, h, N, d]``, laid out in memory as ``[B, N, h, d]``.

    Raises:
        KernelError: a tensor does not have four dimensions, or their sizes contradict each other.
    """
    return _OP(query, key, value, scale)
