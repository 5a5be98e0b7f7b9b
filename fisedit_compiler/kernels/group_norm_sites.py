"""``fisedit::group_norm_sites``: GroupNorm of packed rows with statistics given from outside."""

from __future__ import annotations

import torch
from torch import Tensor

from fisedit_compiler.kernels.registry import define_op, require
from fisedit_compiler.kernels.traits import OpTraits, no_products

_NAME = "group_norm_sites"


def _check(rows: Tensor, statistics: Tensor, groups: int) -> None:
    require(rows.dim() == 3, _NAME, lambda: f"rows must be [B, N, C], got {rows.dim()} dimensions")
    require(
        groups > 0 and rows.shape[2] % groups == 0 and statistics.shape[1] == groups,
        _NAME,
        lambda: (
            f"groups={groups} does not fit {rows.shape[2]} channels and statistics of {statistics.shape[1]} "
            "groups; pass the statistics of this GroupNorm"
        ),
    )


def _reference(
    rows: Tensor, statistics: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> Tensor:
    _check(rows, statistics, groups)
    per_group = rows.shape[2] // groups
    mean, variance = statistics.unbind(dim=-1)
    # Folded to one scale and one shift per channel, the normalisation is a single fused pass over the rows.
    scale = torch.rsqrt(variance + eps)[:, :, None]
    scale = scale.expand(-1, -1, per_group) if weight is None else scale * weight.float().view(groups, -1)
    shift = mean[:, :, None] * scale
    shift = -shift if bias is None else bias.float().view(groups, -1) - shift
    out = torch.addcmul(shift.flatten(1)[:, None], rows.float(), scale.flatten(1)[:, None])
    return out.to(rows.dtype)


def _fake(
    rows: Tensor, statistics: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> Tensor:
    _check(rows, statistics, groups)
    return rows.new_empty(rows.shape)


_OP = define_op(
    f"{_NAME}(Tensor rows, Tensor statistics, Tensor? weight, Tensor? bias, int groups, float eps) -> Tensor",
    _reference,
    _fake,
    traits=OpTraits(flops=no_products, inline=_reference),
)


def group_norm_sites(
    rows: Tensor, statistics: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> Tensor:
    """Normalise ``rows`` with given statistics; with those of the whole map this is GroupNorm.

    Args:
        rows: ``[B, N, C]``.
        statistics: float32 ``[B, groups, 2]``, mean and biased variance.
        weight: ``[C]`` or ``None``.
        bias: ``[C]`` or ``None``.
        groups: number of groups.
        eps: added to the variance, as in ``torch.nn.GroupNorm``.

    Returns:
        ``[B, N, C]``, contiguous, computed in float32 and rounded once to the dtype of ``rows``.

    Raises:
        KernelError: ``groups`` does not divide the channels or does not match the statistics.
    """
    return _OP(rows, statistics, weight, bias, groups, eps)
