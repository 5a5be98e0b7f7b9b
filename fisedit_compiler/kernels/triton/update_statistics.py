"""Statistics of a GroupNorm corrected by what an edit wrote, and what each of its rows contributes, in one launch.

A program owns one group of one sample: it reads the group's channels of every row once, sums them per row, and takes
the sums that were recorded of the same sites off. There are few rows in an edit, so what a launch costs is waiting:
every program reads all of its rows at once, and none waits for another. Where there are many rows, a program owns a
block of them and some neighbouring groups; a second launch adds up what the blocks found, in their order.

Sums over rows are of differences between what a row and its site contribute, so they are as small as the edit's change.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fisedit_compiler.kernels.addresses import ALIGNMENT
from fisedit_compiler.kernels.triton.launching import launch

SMALL_TILE, LARGE_TILE = 2048, 8192
"""Elements that a program holds at once, channels rounded up to a power of two."""
ALONE = 4 * LARGE_TILE
"""Elements up to which one program reads all rows of a group."""
MAX_SPLITS = 32


@triton.jit
def _correct(change, statistics, corrected, group, in_g, elements):
    """The statistics of groups from recorded ones and the ``change`` ``[BLOCK_GROUPS, 2]`` of their sums."""
    mean = tl.load(statistics + group * 2, mask=in_g, other=0.0)
    variance = tl.load(statistics + group * 2 + 1, mask=in_g, other=0.0)
    shift, spread = tl.split(change / elements)
    variance += spread - shift * shift
    tl.store(corrected + group * 2, mean + shift, mask=in_g)
    tl.store(corrected + group * 2 + 1, tl.where(variance < 0.0, 0.0, variance), mask=in_g)  # NaN stays


# These differ from mask to mask, and a new mask must not compile a kernel.
@triton.jit(do_not_specialize=["entry", "count", "per_split", "sites"], do_not_specialize_on_alignment=["addresses"])
def _update_statistics_kernel(
    rows, statistics, site_sums, addresses, entry, active, corrected, row_sums, partial,
    count, per_split, sites, groups, sample_stride, row_stride, recorded_sample_stride, recorded_site_stride,
    PER_GROUP: tl.constexpr, RECORDED_GROUP_STRIDE: tl.constexpr, RECORDED_PAIR_STRIDE: tl.constexpr,
    ADDRESSED: tl.constexpr, ALIGNMENT: tl.constexpr, SUMS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    if ADDRESSED:
        site_sums = tl.multiple_of(tl.load(addresses + entry).to(tl.pointer_type(tl.float32)), ALIGNMENT)
    batch = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    offs_g = tl.program_id(0) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)  # [BLOCK_GROUPS]
    offs_c = tl.arange(0, BLOCK_CHANNELS)  # [BLOCK_CHANNELS]
    pair = tl.arange(0, 2)
    in_g = offs_g < groups
    inside = in_g[:, None] & (offs_c < PER_GROUP)[None, :]  # [BLOCK_GROUPS, BLOCK_CHANNELS]
    channel = offs_g[:, None] * PER_GROUP + offs_c[None, :]
    group = batch * groups + offs_g
    mean = tl.load(statistics + group * 2, mask=in_g, other=0.0)
    change = tl.zeros((BLOCK_GROUPS, 2), dtype=tl.float32)
    end = tl.minimum((split + 1) * per_split, count)
    for start in range(split * per_split, end, BLOCK_ROWS):
        offs_r = start + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
        in_r = offs_r < end
        site = tl.load(active + offs_r, mask=in_r, other=0)
        following = tl.load(active + offs_r + 1, mask=offs_r + 1 < count, other=-1)
        row = batch * sample_stride + offs_r.to(tl.int64) * row_stride
        x = tl.load(
            rows + row[:, None, None] + channel[None, :, :], mask=in_r[:, None, None] & inside[None, :, :], other=0.0
        )  # [BLOCK_ROWS, BLOCK_GROUPS, BLOCK_CHANNELS]
        centred = tl.where(inside[None, :, :], x.to(tl.float32) - mean[None, :, None], 0.0)
        sums = tl.join(tl.sum(centred, axis=2), tl.sum(centred * centred, axis=2))  # [BLOCK_ROWS, BLOCK_GROUPS, 2]
        known = (in_r[:, None] & in_g[None, :])[:, :, None]
        recorded = batch * recorded_sample_stride + site * recorded_site_stride
        place = (recorded[:, None] + (offs_g * RECORDED_GROUP_STRIDE)[None, :])[:, :, None]
        old = tl.load(site_sums + place + (pair * RECORDED_PAIR_STRIDE)[None, None, :], mask=known, other=0.0)
        if SUMS:
            kept = ((batch * count + offs_r)[:, None] * groups + offs_g[None, :])[:, :, None] * 2 + pair[None, None, :]
            tl.store(row_sums + kept, sums, mask=known)
        # Of rows of one site, as padding makes them, the last one counts.
        counts = in_r & (site != following)
        change += tl.sum(tl.where(counts[:, None, None], sums - old, 0.0), axis=0)
    if SPLIT:
        found = ((batch * tl.num_programs(2) + split) * groups + offs_g)[:, None] * 2 + pair[None, :]
        tl.store(partial + found, change, mask=in_g[:, None])
    else:
        _correct(change, statistics, corrected, group, in_g, sites.to(tl.float32) * PER_GROUP)


@triton.jit(do_not_specialize=["splits", "sites"])
def _add_splits_kernel(
    partial, statistics, corrected, splits, sites, groups,
    PER_GROUP: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    offs_g = tl.program_id(0) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)  # [BLOCK_GROUPS]
    offs_s = tl.arange(0, BLOCK_SPLITS)  # [BLOCK_SPLITS]
    in_g = offs_g < groups
    inside = ((offs_s < splits)[:, None] & in_g[None, :])[:, :, None]
    place = ((batch * splits + offs_s)[:, None] * groups + offs_g[None, :])[:, :, None] * 2
    found = tl.load(partial + place + tl.arange(0, 2)[None, None, :], mask=inside, other=0.0)
    group = batch * groups + offs_g
    _correct(tl.sum(found, axis=0), statistics, corrected, group, in_g, sites.to(tl.float32) * PER_GROUP)


@dataclass(frozen=True)
class Tile:
    """Launch parameters.

    Attributes:
        rows: that a program reads at once.
        groups: that a program sums, neighbours.
        splits: blocks of rows; with more than one a second launch adds them up.
        warps: of a program.
    """

    rows: int
    groups: int
    splits: int
    warps: int


def choose_tile(batch: int, groups: int, per_group: int, count: int, processors: int) -> Tile:
    """One launch while a group's rows are few; else blocks of rows and of groups, enough to fill the chip twice."""
    channels = triton.next_power_of_2(per_group)
    if count * channels <= ALONE:
        size, warps = (SMALL_TILE, 4) if count * channels <= SMALL_TILE else (LARGE_TILE, 8)
        return Tile(max(size // channels, 1), 1, 1, warps)
    together = max(min(4, 256 // channels, triton.next_power_of_2(groups)), 1)
    rows = max(LARGE_TILE // (channels * together), 1)
    programs = batch * triton.cdiv(groups, together)
    splits = max(min(triton.cdiv(2 * processors, programs), triton.cdiv(count, rows), MAX_SPLITS), 1)
    return Tile(rows, together, splits, 8)


def update_statistics(
    rows: Tensor, statistics: Tensor, site_sums: Tensor, active: Tensor, *, sums: bool,
    addresses: Tensor | None = None, entry: int = 0, tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The ``fisedit::update_statistics`` op on a GPU, with ``fisedit::group_norm_row_sums`` of the same rows.

    See their references for shapes.

    Args:
        rows: see the op; the others likewise.
        statistics: see ``rows``.
        site_sums: see ``rows``.
        active: see ``rows``.
        sums: whether the sums of the rows are wanted; the second result is empty without.
        addresses: int64 ``[A]``; when given, the site sums are read at ``addresses[entry]``, and ``site_sums`` gives
            only their shape and strides.
        entry: see ``addresses``.
        tile: forces launch parameters (tests, tuning).
    """
    rows = rows if rows.stride(2) == 1 else rows.contiguous()
    statistics, active = statistics.contiguous(), active.contiguous()
    batch, count, channels = rows.shape
    sites, groups = site_sums.shape[1], statistics.shape[1]
    per_group = channels // groups
    corrected = torch.empty_like(statistics)
    row_sums = statistics.new_empty(batch, count if sums else 0, groups, 2)
    if not corrected.numel():
        return corrected, row_sums
    if tile is None:
        processors = torch.cuda.get_device_properties(rows.device).multi_processor_count if rows.is_cuda else 1
        tile = choose_tile(batch, groups, per_group, count, processors)
    per_split = triton.cdiv(triton.cdiv(count, tile.splits), tile.rows) * tile.rows
    splits = max(triton.cdiv(count, per_split), 1) if count else 1
    partial = statistics.new_empty(batch, splits, groups, 2) if splits > 1 else corrected
    launch(
        _update_statistics_kernel, (triton.cdiv(groups, tile.groups), batch, splits),
        rows, statistics, site_sums, active if addresses is None else addresses, entry, active, corrected, row_sums,
        partial, count, per_split, sites, groups, rows.stride(0), rows.stride(1), site_sums.stride(0),
        site_sums.stride(1), PER_GROUP=per_group, RECORDED_GROUP_STRIDE=site_sums.stride(2),
        RECORDED_PAIR_STRIDE=site_sums.stride(3), ADDRESSED=addresses is not None, ALIGNMENT=ALIGNMENT, SUMS=sums,
        SPLIT=splits > 1, BLOCK_ROWS=tile.rows, BLOCK_GROUPS=tile.groups,
        BLOCK_CHANNELS=triton.next_power_of_2(per_group), num_warps=tile.warps,
    )  # fmt: skip
    if splits > 1:
        block = min(triton.next_power_of_2(groups), 32)
        launch(
            _add_splits_kernel, (triton.cdiv(groups, block), batch),
            partial, statistics, corrected, splits, sites, groups,
            PER_GROUP=per_group, BLOCK_SPLITS=MAX_SPLITS, BLOCK_GROUPS=block,
        )  # fmt: skip
    return corrected, row_sums
