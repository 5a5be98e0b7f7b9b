"""``fisedit::update_statistics``: recorded GroupNorm statistics corrected for the sites that changed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from fisedit_compiler.kernels.padding import counting_rows
from fisedit_compiler.kernels.providers import Provider
from fisedit_compiler.kernels.registry import define_op, require
from fisedit_compiler.kernels.traits import OpTraits, Update, no_products

_NAME = "update_statistics"


def check(op: str, rows: Tensor, statistics: Tensor, site_sums: Tensor) -> None:
    """Refuse rows and recorded values that are not of one GroupNorm.

    Raises:
        KernelError: shapes contradict each other.
    """
    groups = statistics.shape[1]
    require(
        rows.dim() == 3 and site_sums.dim() == 4,
        op,
        lambda: f"rows must be [B, N, C] and site_sums [B, S, G, 2], got {rows.dim()} and {site_sums.dim()} dims",
    )
    require(
        rows.shape[2] % groups == 0 and site_sums.shape[2] == groups,
        op,
        lambda: (
            f"{groups} groups of statistics fit neither {rows.shape[2]} channels nor site sums of "
            f"{site_sums.shape[2]} groups; all three must come from the same GroupNorm"
        ),
    )


def corrected(rows: Tensor, statistics: Tensor, site_sums: Tensor, active: Tensor) -> Tensor:
    """What the op computes, in plain PyTorch."""
    batch, count, channels = rows.shape
    groups = statistics.shape[1]
    elements = site_sums.shape[1] * (channels // groups)
    mean, variance = statistics.unbind(dim=-1)
    centred = rows.float().reshape(batch, count, groups, channels // groups) - mean[:, None, :, None]
    counts = counting_rows(active)[None, :, None, None]
    centred = torch.where(counts, centred, 0.0)
    new = torch.stack([centred.sum(dim=(1, 3)), centred.square().sum(dim=(1, 3))], dim=-1)
    old = torch.where(counts, site_sums.index_select(1, active), 0.0).sum(dim=1)
    change = (new - old) / elements
    shift, spread = change.unbind(dim=-1)
    # The sums are shifted by the recorded mean, so moving the mean by `shift` costs exactly shift**2.
    return torch.stack([mean + shift, (variance + spread - shift.square()).clamp(min=0)], dim=-1)


def _reference(rows: Tensor, statistics: Tensor, site_sums: Tensor, active: Tensor) -> Tensor:
    check(_NAME, rows, statistics, site_sums)
    return corrected(rows, statistics, site_sums, active)


def _fake(rows: Tensor, statistics: Tensor, site_sums: Tensor, active: Tensor) -> Tensor:
    check(_NAME, rows, statistics, site_sums)
    return rows.new_empty((rows.shape[0], statistics.shape[1], 2), dtype=torch.float32)


@cache
def triton_kernel() -> Callable[..., tuple[Tensor, Tensor]]:
    """Triton is there only where a GPU is; looked up once, since an import statement takes a microsecond each time."""
    from fisedit_compiler.kernels.triton.update_statistics import update_statistics

    return update_statistics


def _cuda(rows: Tensor, statistics: Tensor, site_sums: Tensor, active: Tensor) -> Tensor:
    check(_NAME, rows, statistics, site_sums)
    return triton_kernel()(rows, statistics, site_sums, active, sums=False)[0]


_OP = define_op(
    f"{_NAME}(Tensor rows, Tensor statistics, Tensor site_sums, Tensor active) -> Tensor",
    _reference,
    _fake,
    traits=OpTraits(
        flops=no_products,
        inline=_reference,
        updates=(Update(recorded=1, new=None), Update(recorded=2, new=0)),
    ),
    providers=[Provider("triton", "CUDA", _cuda)],
)


def update_statistics(rows: Tensor, statistics: Tensor, site_sums: Tensor, active: Tensor) -> Tensor:
    """The statistics of the whole map after its active sites were replaced by ``rows``.

    Exact up to rounding, at two sums per site and group instead of a pass over the dense map.

    Args:
        rows: new values of the active sites ``[B, N, C]``.
        statistics: recorded float32 ``[B, G, 2]``.
        site_sums: recorded float32 ``[B, S, G, 2]``, from ``group_norm_site_sums`` with the same statistics.
        active: int64 ``[N]``, ascending; of rows of one site, as padding makes them, only one counts.

    Returns:
        float32 ``[B, G, 2]``; the variance is clamped at zero.

    Raises:
        KernelError: the three recorded shapes are not of one GroupNorm.
    """
    return _OP(rows, statistics, site_sums, active)
