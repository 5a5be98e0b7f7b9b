"""``fisedit::update_statistics_addressed``: ``update_statistics`` inside a CUDA graph, with what an edit keeps of it.

Site sums of a call are eighty megabytes, of which an edit reads those of its active sites: they are found through a
table of addresses, as ``attention_addressed`` finds keys and values. An edit that is recorded keeps the sums of its
rows, which are added up on the way: the op is ``group_norm_row_sums`` as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisedit_compiler.kernels.addresses import tensor_at
from fisedit_compiler.kernels.group_norm_row_sums import row_sums
from fisedit_compiler.kernels.providers import Provider
from fisedit_compiler.kernels.registry import define_op
from fisedit_compiler.kernels.traits import OpTraits, no_products
from fisedit_compiler.kernels.update_statistics import check, corrected, triton_kernel

_NAME = "update_statistics_addressed"


def _reference(
    rows: Tensor, statistics: Tensor, site_sums: Tensor, active: Tensor, addresses: Tensor, entry: int, sums: bool
) -> tuple[Tensor, Tensor]:
    check(_NAME, rows, statistics, site_sums)
    site_sums = tensor_at(int(addresses[entry]), site_sums)
    kept = row_sums(rows if sums else rows[:, :0], statistics)
    return corrected(rows, statistics, site_sums, active), kept


def _fake(
    rows: Tensor, statistics: Tensor, site_sums: Tensor, active: Tensor, addresses: Tensor, entry: int, sums: bool
) -> tuple[Tensor, Tensor]:
    check(_NAME, rows, statistics, site_sums)
    batch, count, groups = rows.shape[0], rows.shape[1] if sums else 0, statistics.shape[1]
    updated = rows.new_empty((batch, groups, 2), dtype=torch.float32)
    return updated, rows.new_empty((batch, count, groups, 2), dtype=torch.float32)


def _cuda(
    rows: Tensor, statistics: Tensor, site_sums: Tensor, active: Tensor, addresses: Tensor, entry: int, sums: bool
) -> tuple[Tensor, Tensor]:
    check(_NAME, rows, statistics, site_sums)
    return triton_kernel()(rows, statistics, site_sums, active, sums=sums, addresses=addresses, entry=entry)


_OP = define_op(
    f"{_NAME}(Tensor rows, Tensor statistics, Tensor site_sums, Tensor active, Tensor addresses, int entry, bool sums) "
    "-> (Tensor, Tensor)",
    _reference,
    _fake,
    traits=OpTraits(flops=no_products),
    providers=[Provider("triton", "CUDA", _cuda)],
)


def update_statistics_addressed(
    rows: Tensor, statistics: Tensor, site_sums: Tensor, active: Tensor, addresses: Tensor, entry: int, sums: bool
) -> tuple[Tensor, Tensor]:
    """:func:`update_statistics` whose site sums are found through a table of addresses, with the sums of the rows.

    Args:
        rows: new values of the active sites ``[B, N, C]``.
        statistics: recorded float32 ``[B, G, 2]``.
        site_sums: recorded float32 ``[B, S, G, 2]``: shape and strides count; their address is in the table.
        active: int64 ``[N]``, ascending; of rows of one site, as padding makes them, only one counts.
        addresses: int64 ``[A]`` on the device. The entry must be the address of the site sums when the op runs; a CUDA
            graph reads it at every replay, so they may be others then (of equal layout, 16-byte aligned).
        entry: of the site sums in the table.
        sums: whether the sums of the rows are wanted.

    Returns:
        float32 ``[B, G, 2]``; and ``group_norm_row_sums`` of the rows, float32 ``[B, N, G, 2]``, or of none of them.

    Raises:
        KernelError: the three recorded shapes are not of one GroupNorm.
    """
    result: tuple[Tensor, Tensor] = _OP.overload(rows, statistics, site_sums, active, addresses, entry, sums)
    return result
