"""``fisedit::attention_map``: how much sites attend to the tokens of a text, some tokens' share from elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from fisedit_compiler.kernels.formulas import product_flops
from fisedit_compiler.kernels.registry import define_op, require
from fisedit_compiler.kernels.traits import OpTraits

_NAME = "attention_map"


def check_map(op: str, query: Tensor, key: Tensor, recorded: Tensor | None, columns: Tensor | None) -> None:
    """Refuse operands that contradict each other; only ranks, dtypes and sizes that tracing keeps static are read.

    Raises:
        KernelError: names the operands.
    """
    require(
        query.dim() == 4 and key.dim() == 4,
        op,
        lambda: f"query and key must be [B, heads, N, d], got {query.dim()} and {key.dim()} dimensions",
    )
    require(
        (recorded is None) == (columns is None), op, lambda: "a recorded map and columns belong together; pass both"
    )
    if recorded is None or columns is None:
        return
    require(
        recorded.dim() == 4 and columns.dim() == 2 and columns.dtype == torch.int64,
        op,
        lambda: (
            f"the recorded map must be [B, heads, S, T'] and columns int64 [B, T], got {recorded.dim()} dimensions and "
            f"{columns.dtype} in {columns.dim()}"
        ),
    )


def mixed_map(
    query: Tensor, key: Tensor, scale: float | None, recorded: Tensor | None, columns: Tensor | None
) -> Tensor:
    """The map in the precision it is computed in: float32 for half precision, else the query's."""
    precise = torch.float32 if query.dtype in (torch.float16, torch.bfloat16) else query.dtype
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    weights = (query.to(precise) @ key.to(precise).transpose(-1, -2) * factor).softmax(-1)
    if recorded is None or columns is None:
        return weights
    batch, heads, sites, _ = weights.shape
    index = columns.clamp(min=0)[:, None, None, :].expand(batch, heads, sites, columns.shape[1])
    return torch.where((columns >= 0)[:, None, None, :], recorded.gather(-1, index).to(precise), weights)


def _reference(
    query: Tensor,
    key: Tensor,
    scale: float | None = None,
    recorded: Tensor | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    check_map(_NAME, query, key, recorded, columns)
    return mixed_map(query, key, scale, recorded, columns).to(query.dtype)


def _fake(
    query: Tensor,
    key: Tensor,
    scale: float | None = None,
    recorded: Tensor | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    check_map(_NAME, query, key, recorded, columns)
    return query.new_empty(*query.shape[:3], key.shape[2])


_OP = define_op(
    f"{_NAME}(Tensor query, Tensor key, float? scale=None, Tensor? recorded=None, Tensor? columns=None) -> Tensor",
    _reference,
    _fake,
    traits=OpTraits(flops=product_flops),
)


def attention_map(
    query: Tensor,
    key: Tensor,
    scale: float | None = None,
    recorded: Tensor | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    """``softmax(query @ key^T * scale)``, with some columns from a recorded map.

    Args:
        query: ``[B, h, S, d]``, one row a site.
        key: ``[B, h, T, d]``, one row a token.
        scale: factor of the logits, ``1 / sqrt(d)`` if ``None``.
        recorded: a map ``[B, h, S, T']`` of another text, or ``None``.
        columns: int64 ``[B, T]``: the recorded column that stands for each token, -1 for the token's own. Rows no
            longer add up to one where it is used, as in prompt-to-prompt (Hertz et al., 2022, ``AttentionRefine``).

    Returns:
        ``[B, h, S, T]`` in the query's dtype; the softmax of half precision is computed in float32.

    Raises:
        KernelError: ranks or dtypes are others, or only one of ``recorded`` and ``columns`` is given.
    """
    return _OP(query, key, scale, recorded, columns)
