"""``fisedit::recentre_site_sums``: site sums about one mean turned into site sums about another.

With ``c`` channels a group and ``d = new mean - old mean``: ``sum(x - new) = sum(x - old) - c d`` and
``sum((x - new)^2) = sum((x - old)^2) - 2 d sum(x - old) + c d^2``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisedit_compiler.kernels.registry import define_op
from fisedit_compiler.kernels.traits import OpTraits, no_products

_NAME = "recentre_site_sums"


def _reference(site_sums: Tensor, old: Tensor, new: Tensor, channels: int) -> Tensor:
    per_group = channels / site_sums.shape[2]
    shift = (new[..., 0] - old[..., 0]).unsqueeze(1)
    first, second = site_sums.unbind(dim=-1)
    return torch.stack([first - per_group * shift, second - 2 * shift * first + per_group * shift.square()], dim=-1)


def _fake(site_sums: Tensor, old: Tensor, new: Tensor, channels: int) -> Tensor:
    return site_sums.new_empty(site_sums.shape)


_OP = define_op(
    f"{_NAME}(Tensor site_sums, Tensor old, Tensor new, SymInt channels) -> Tensor",
    _reference,
    _fake,
    traits=OpTraits(flops=no_products, inline=_reference),
)


def recentre_site_sums(site_sums: Tensor, old: Tensor, new: Tensor, channels: int) -> Tensor:
    """Site sums about the mean of ``new`` from site sums about the mean of ``old``.

    Args:
        site_sums: float32 ``[B, S, G, 2]``, see ``group_norm_site_sums``.
        old: statistics float32 ``[B, G, 2]`` the sums are centred on.
        new: statistics float32 ``[B, G, 2]`` to centre them on.
        channels: number of all channels, shared equally by the groups.

    Returns:
        float32 ``[B, S, G, 2]``.
    """
    return _OP(site_sums, old, new, channels)
