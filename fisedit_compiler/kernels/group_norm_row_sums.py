"""``fisedit::group_norm_row_sums``: what each row of an edit contributes to one GroupNorm's statistics.

The same numbers as those that ``group_norm_site_sums`` gives of a dense map, of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisedit_compiler.kernels.registry import define_op, require
from fisedit_compiler.kernels.traits import OpTraits, no_products

_NAME = "group_norm_row_sums"


def check_rows(op: str, rows: Tensor, statistics: Tensor) -> None:
    """Refuse rows and statistics that are not of one GroupNorm.

    Raises:
        KernelError: ``rows`` has the wrong rank, or the groups of the statistics do not divide its channels.
    """
    require(rows.dim() == 3, op, lambda: f"rows must be [B, N, C], got {rows.dim()} dimensions")
    require(
        statistics.dim() == 3 and rows.shape[2] % statistics.shape[1] == 0,
        op,
        lambda: (
            f"statistics {tuple(statistics.shape)} are not [B, G, 2] with groups that divide {rows.shape[2]} channels; "
            "rows and statistics must come from the same GroupNorm"
        ),
    )


def row_sums(rows: Tensor, statistics: Tensor) -> Tensor:
    """What the op computes, in plain PyTorch."""
    batch, count, channels = rows.shape
    groups = statistics.shape[1]
    centred = rows.float().reshape(batch, count, groups, channels // groups) - statistics[:, None, :, :1]
    return torch.stack([centred.sum(dim=3), centred.square().sum(dim=3)], dim=-1)


def _reference(rows: Tensor, statistics: Tensor) -> Tensor:
    check_rows(_NAME, rows, statistics)
    return row_sums(rows, statistics)


def _fake(rows: Tensor, statistics: Tensor) -> Tensor:
    check_rows(_NAME, rows, statistics)
    return rows.new_empty((rows.shape[0], rows.shape[1], statistics.shape[1], 2), dtype=torch.float32)


_OP = define_op(
    f"{_NAME}(Tensor rows, Tensor statistics) -> Tensor",
    _reference,
    _fake,
    traits=OpTraits(flops=no_products, inline=_reference),
)


def group_norm_row_sums(rows: Tensor, statistics: Tensor) -> Tensor:
    """Per row and group, the sums of ``x - mean`` and ``(x - mean)**2`` over the group's channels.

    Args:
        rows: ``[B, N, C]``.
        statistics: recorded float32 ``[B, G, 2]``, whose mean the sums are shifted by.

    Returns:
        float32 ``[B, N, G, 2]``.

    Raises:
        KernelError: the statistics are not of these rows' GroupNorm.
    """
    return _OP(rows, statistics)
