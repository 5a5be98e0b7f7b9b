"""``fisedit::group_norm_site_sums``: what each site contributed to one GroupNorm's recorded statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from fisedit_compiler.kernels.registry import define_op, require
from fisedit_compiler.kernels.traits import OpTraits, no_products

_NAME = "group_norm_site_sums"


def _check(x: Tensor, groups: int) -> None:
    require(
        x.dim() >= 3 and groups > 0 and x.shape[1] % groups == 0,
        _NAME,
        lambda: f"x must be [B, C, *spatial] with C divisible by groups={groups}, got shape {tuple(x.shape)}",
    )


def _reference(x: Tensor, statistics: Tensor, groups: int) -> Tensor:
    _check(x, groups)
    batch, channels = x.shape[:2]
    grouped = x.float().reshape(batch, groups, channels // groups, -1)
    centred = grouped - statistics[:, :, 0, None, None]
    sums = torch.stack([centred.sum(dim=2), centred.square().sum(dim=2)], dim=-1)  # [B, G, S, 2]
    return sums.transpose(1, 2).contiguous()


def _fake(x: Tensor, statistics: Tensor, groups: int) -> Tensor:
    _check(x, groups)
    sites = 1
    for size in x.shape[2:]:
        sites = sites * size
    return x.new_empty((x.shape[0], sites, groups, 2), dtype=torch.float32)


_OP = define_op(
    f"{_NAME}(Tensor x, Tensor statistics, int groups) -> Tensor",
    _reference,
    _fake,
    traits=OpTraits(flops=no_products, inline=_reference),
)


def group_norm_site_sums(x: Tensor, statistics: Tensor, groups: int) -> Tensor:
    """Per site and group, the sums of ``x - mean`` and ``(x - mean)**2`` over the group's channels.

    The sums are shifted by the recorded mean: raw sums of squares would lose the variance to cancellation.

    Args:
        x: the GroupNorm's input ``[B, C, *spatial]``.
        statistics: its float32 ``[B, groups, 2]``, from ``group_norm_statistics``.
        groups: number of groups.

    Returns:
        float32 ``[B, S, groups, 2]``, ``S`` the number of sites.

    Raises:
        KernelError: ``groups`` does not divide the channels, or ``x`` has no spatial dimension.
    """
    return _OP(x, statistics, groups)
