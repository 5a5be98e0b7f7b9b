"""``fisedit::attention_with_map``: attention of sites to a text whose map is partly a recorded one."""

from __future__ import annotations

from torch import Tensor

from fisedit_compiler.kernels.attention_map import check_map, mixed_map
from fisedit_compiler.kernels.formulas import attention_flops
from fisedit_compiler.kernels.registry import define_op, require
from fisedit_compiler.kernels.traits import OpTraits

_NAME = "attention_with_map"


def _check(query: Tensor, key: Tensor, value: Tensor, recorded: Tensor, columns: Tensor) -> None:
    check_map(_NAME, query, key, recorded, columns)
    require(value.dim() == 4, _NAME, lambda: f"value must be [B, heads, T, d], got {value.dim()} dimensions")


def _reference(
    query: Tensor, key: Tensor, value: Tensor, recorded: Tensor, columns: Tensor, scale: float | None = None
) -> Tensor:
    _check(query, key, value, recorded, columns)
    out = mixed_map(query, key, scale, recorded, columns).to(value.dtype) @ value
    # [B, S, h, d] in memory, as torch's own attention leaves it: the graph behind takes views of that.
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _fake(
    query: Tensor, key: Tensor, value: Tensor, recorded: Tensor, columns: Tensor, scale: float | None = None
) -> Tensor:
    _check(query, key, value, recorded, columns)
    batch, heads, count, _ = query.shape
    return query.new_empty(batch, count, heads, value.shape[3]).transpose(1, 2)


_OP = define_op(
    f"{_NAME}(Tensor query, Tensor key, Tensor value, Tensor recorded, Tensor columns, float? scale=None) -> Tensor",
    _reference,
    _fake,
    traits=OpTraits(flops=attention_flops),
)


def attention_with_map(
    query: Tensor, key: Tensor, value: Tensor, recorded: Tensor, columns: Tensor, scale: float | None = None
) -> Tensor:
    """``attention_map(query, key, scale, recorded, columns) @ value``.

    Args:
        query: ``[B, h, S, d]``, one row a site.
        key: ``[B, h, T, d]``, one row a token of the edited text.
        value: ``[B, h, T, d]``.
        recorded: map ``[B, h, S, T']`` of the base's text.
        columns: int64 ``[B, T]``: the recorded column that stands for each token, -1 for the token's own.
        scale: factor of the logits, ``1 / sqrt(d)`` if ``None``.

    Returns:
        ``[B, h, S, d]``, laid out in memory as ``[B, S, h, d]``.

    Raises:
        KernelError: ranks or dtypes are others.
    """
    return _OP(query, key, value, recorded, columns, scale)
