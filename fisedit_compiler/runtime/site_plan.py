"""The index tables of one mask at every level: active sites, rings and convolution taps.

Pure geometry: no tensor of a model and no recording may appear here. A plan is built once per mask (a few
milliseconds on the CPU), serves every call of a run, and describes and draws itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from fisedit_compiler.errors import MaskError, PlanError
from fisedit_compiler.kernels.attention_sites import inverse_table

_SHADES = "·░▒▓█"


@dataclass(frozen=True)
class ConvKey:
    """Geometry of one convolution as an index table; convolutions with equal keys share their tables.

    Attributes:
        source: level of the input canvas (1 is the spatial input's own resolution, 2 half of it, 1/2 double).
        target: level of the output.
        kernel: height and width of the kernel.
        stride: stride along height and width.
        padding: zero padding along height and width, on both sides.
        dilation: dilation along height and width.
        upsample: nearest upsampling of the source before the convolution; taps index the coarse canvas.
    """

    source: Fraction
    target: Fraction
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    upsample: int = 1

    def __str__(self) -> str:
        steps = [f"{self.kernel[0]}x{self.kernel[1]}", f"{self.source}->{self.target}"]
        steps += [f"stride {self.stride[0]}"] if self.stride != (1, 1) else []
        steps += [f"dilation {self.dilation[0]}"] if self.dilation != (1, 1) else []
        steps += [f"upsample {self.upsample}"] if self.upsample != 1 else []
        return " ".join(steps)


@dataclass(frozen=True, eq=False, repr=False)
class SitePlan:
    """Which sites an edit computes at every level, and where each convolution output reads its inputs.

    Built by ``SitePlan.build``. Invariant: the parents of an active site are active at every coarser level.

    Attributes:
        height: rows of the level-1 lattice.
        width: columns of the level-1 lattice.
        active: per level, the active sites as int64 ``[N_s]``, ascending in row-major order.
        ring: per convolution, the inactive source sites that are read, int64 ``[R]``, ascending.
        taps: per convolution, int64 ``[N_out, K]`` into ``[rows (N_in), canvas[:, ring] (R), a zero site]``.
    """

    height: int
    width: int
    active: Mapping[Fraction, Tensor]
    ring: Mapping[ConvKey, Tensor] = field(default_factory=dict)
    taps: Mapping[ConvKey, Tensor] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        mask: Tensor,
        levels: Iterable[Fraction],
        convs: Iterable[ConvKey],
        *,
        dilation: int = 0,
        dense_levels: Collection[Fraction] = (),
        device: torch.device | str = "cpu",
    ) -> SitePlan:
        """Derive every table from a mask.

        A site of a coarser level is active if any level-1 site below it is; a finer level repeats level 1.

        Args:
            mask: bool ``[H, W]`` at level 1, true where the edit may change the latent.
            levels: levels to plan; level 1 and the levels of ``convs`` are added.
            convs: the convolutions to tabulate.
            dilation: sites by which the mask grows in every direction (a square) before anything else.
            dense_levels: levels that compute all their sites, where rows cost more than they save. All
                coarser levels become dense with them, since the parent of an active site must be active. An
                empty mask stays empty: there is nothing to compute.
            device: where the tables go; they are built on the CPU.

        Raises:
            MaskError: the mask is not a bool matrix with at least one site.
            PlanError: a level does not divide the mask's size, or a convolution contradicts its levels.
        """
        _check_mask(mask)
        if dilation < 0:
            raise PlanError(f"dilation is {dilation}; it is a number of sites, 0 or more")
        mask = _dilate(mask.detach().cpu(), dilation)
        height, width = mask.shape
        keys = tuple(dict.fromkeys(convs))
        wanted = {Fraction(1), *map(Fraction, levels), *map(Fraction, dense_levels)}
        wanted |= {level for key in keys for level in (key.source, key.target)}
        finest_dense = min(map(Fraction, dense_levels), default=None)
        empty = not bool(mask.any())

        masks = {}
        for level in sorted(wanted):
            masks[level] = _mask_at(mask, level)
            if finest_dense is not None and level >= finest_dense and not empty:
                masks[level] = torch.ones_like(masks[level])
        active = {level: at.flatten().nonzero().flatten() for level, at in masks.items()}

        ring, taps = {}, {}
        for key in keys:
            ring[key], taps[key] = _tabulate(key, active[key.source], active[key.target], masks)
        plan = cls(height, width, active, ring, taps)
        return plan if torch.device(device).type == "cpu" else plan.to(device)

    def to(self, device: torch.device | str) -> SitePlan:
        """The same plan with its tables on ``device``."""

        def move(tables: Mapping[Fraction, Tensor]) -> dict[Fraction, Tensor]:
            return {key: table.to(device) for key, table in tables.items()}

        def move_convs(tables: Mapping[ConvKey, Tensor]) -> dict[ConvKey, Tensor]:
            return {key: table.to(device) for key, table in tables.items()}

        return SitePlan(self.height, self.width, move(self.active), move_convs(self.ring), move_convs(self.taps))

    @cached_property
    def inverse(self) -> Mapping[Fraction, Tensor]:
        """Per level, int32 ``[H_s*W_s]``: the row of every active site, -1 elsewhere."""
        tables = {}
        for level, active in self.active.items():
            height, width = self.size(level)
            tables[level] = inverse_table(active, height * width)
        return tables

    def padded(self, rows: Mapping[Fraction, int], rings: Mapping[ConvKey, int]) -> SitePlan:
        """The same plan with more rows: the last active site and the last ring site are repeated.

        Repeated rows compute the same values once more, so whatever is written from them is the same. Ops that sum
        over rows or attend among them count every site once (``kernels/padding.py``).

        Args:
            rows: per level, the number of rows to have, at least as many as there are.
            rings: per convolution, the number of ring sites to have, likewise.
        """
        active = {level: _repeat_last(table, rows[level]) for level, table in self.active.items()}
        ring = {key: _repeat_last(table, rings[key]) for key, table in self.ring.items()}
        taps = {}
        for key, table in self.taps.items():
            inputs, ring_size = self.rows(key.source), self.ring[key].shape[0]
            ring_index = table - inputs + rows[key.source]
            moved = torch.where(table < inputs, table, ring_index)
            moved = torch.where(table == inputs + ring_size, rows[key.source] + rings[key], moved)
            taps[key] = _repeat_last(moved, rows[key.target])
        return SitePlan(self.height, self.width, active, ring, taps)

    def size(self, level: Fraction) -> tuple[int, int]:
        """Height and width of the lattice at ``level``."""
        return _size_at(self.height, self.width, level)

    def rows(self, level: Fraction) -> int:
        """Number of active sites at ``level``."""
        return self._active_at(level).shape[0]

    def active_mask(self, level: Fraction) -> Tensor:
        """The active sites of ``level`` as bool ``[H_s, W_s]``, on the plan's device."""
        active = self._active_at(level)
        height, width = self.size(level)
        mask = torch.zeros(height * width, dtype=torch.bool, device=active.device)
        mask[active] = True
        return mask.view(height, width)

    @property
    def area(self) -> float:
        """Fraction of level-1 sites that are active."""
        return self.rows(Fraction(1)) / (self.height * self.width)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is active: the edit is the base result."""
        return self.rows(Fraction(1)) == 0

    @property
    def is_full(self) -> bool:
        """Whether every site of every level is active: the edit is the dense run."""
        return all(self.rows(level) == self.size(level)[0] * self.size(level)[1] for level in self.active)

    def summary(self) -> str:
        """One line per level (active of all sites) and per convolution (ring size), for people."""
        lines = [f"SitePlan {self.height}x{self.width}, {self.area:.1%} active"]
        for level in sorted(self.active):
            height, width = self.size(level)
            rows = self.rows(level)
            share = rows / (height * width)
            lines.append(f"  level {level!s:>4}: {rows:>6} of {height * width:>6} sites ({share:6.1%})")
        for key in sorted(self.taps, key=lambda key: (key.source, key.target, str(key))):
            ring, (outputs, taps) = self.ring[key].shape[0], self.taps[key].shape
            lines.append(f"  conv {key}: {outputs} outputs x {taps} taps, ring {ring}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return self.summary()

    def draw(self, level: Fraction = Fraction(1), max_width: int = 64) -> str:
        """Draw the active sites of a level with shaded characters, ``·`` for none to ``█`` for all.

        Wide lattices are scaled down to ``max_width`` columns. A character is about twice as high as wide,
        so each stands for two rows of sites to one column.
        """
        mask = self.active_mask(level).float().cpu()
        step = max(1, -(-mask.shape[1] // max_width))
        cell = (2 * step, step)
        # ceil_mode averages a cell that overhangs the edge over the sites it really has.
        shares = F.avg_pool2d(mask[None, None], cell, cell, ceil_mode=True, count_include_pad=False)[0, 0]
        # ceil, so that a single active site still shows.
        shades = (shares * (len(_SHADES) - 1)).ceil().long().tolist()
        return "\n".join("".join(_SHADES[shade] for shade in line) for line in shades)

    def _active_at(self, level: Fraction) -> Tensor:
        if level not in self.active:
            planned = ", ".join(str(known) for known in sorted(self.active))
            raise PlanError(f"level {level} is not in this plan (it has {planned}); name it in `levels`")
        return self.active[level]


def _repeat_last(table: Tensor, count: int) -> Tensor:
    """``table`` with its last entry repeated to ``count`` entries (an empty one is filled with zeros)."""
    missing = count - table.shape[0]
    if missing < 0:
        raise PlanError(f"a table of {table.shape[0]} entries cannot be padded to {count}")
    if missing == 0:
        return table
    last = table[-1:] if table.shape[0] else table.new_zeros(1, *table.shape[1:])
    return torch.cat([table, last.expand(missing, *table.shape[1:])])


def _check_mask(mask: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise MaskError(f"a site plan needs a bool tensor as mask, got {found}; pass e.g. `mask > 0.5`")
    if mask.dim() != 2 or mask.numel() == 0:
        raise MaskError(f"a site plan needs a mask [H, W] of latent sites, got shape {tuple(mask.shape)}")


def _size_at(height: int, width: int, level: Fraction) -> tuple[int, int]:
    """Sites along height and width at ``level``; the error is for the user, who chose the image's size."""
    if level <= 0 or (level.numerator != 1 and level.denominator != 1):
        raise PlanError(f"level {level} is neither a whole factor nor one over a whole factor")
    rows, columns = Fraction(height) / level, Fraction(width) / level
    if rows.denominator != 1 or columns.denominator != 1:
        raise PlanError(
            f"{height}x{width} sites cannot be divided by level {level}; choose an image size whose latent "
            f"is a multiple of {level} in both directions"
        )
    return int(rows), int(columns)


def _dilate(mask: Tensor, sites: int) -> Tensor:
    if sites == 0:
        return mask
    # A square is separable: two thin poolings instead of one of (2*sites+1)**2.
    grown = F.max_pool2d(mask.float()[None, None], (2 * sites + 1, 1), 1, (sites, 0))
    return F.max_pool2d(grown, (1, 2 * sites + 1), 1, (0, sites))[0, 0].bool()


def _mask_at(mask: Tensor, level: Fraction) -> Tensor:
    """The level-1 mask at another level: any below for coarser levels, repeated for finer ones."""
    height, width = _size_at(mask.shape[0], mask.shape[1], level)
    if level >= 1:
        factor = level.numerator
        return mask.reshape(height, factor, width, factor).any(dim=3).any(dim=1)
    factor = level.denominator
    return mask.repeat_interleave(factor, 0).repeat_interleave(factor, 1)


def _check_geometry(key: ConvKey, source: tuple[int, int], target: tuple[int, int]) -> None:
    for axis in (0, 1):
        padded = source[axis] * key.upsample + 2 * key.padding[axis]
        reach = key.dilation[axis] * (key.kernel[axis] - 1) + 1
        outputs = (padded - reach) // key.stride[axis] + 1
        if outputs != target[axis]:
            raise PlanError(
                f"convolution {key} turns {source[axis]} sites of level {key.source} into {outputs}, but "
                f"level {key.target} has {target[axis]}; its levels, stride, padding or upsampling are wrong"
            )


def _tabulate(
    key: ConvKey, rows_in: Tensor, rows_out: Tensor, masks: Mapping[Fraction, Tensor]
) -> tuple[Tensor, Tensor]:
    """Ring ``[R]`` and taps ``[N_out, K]`` of one convolution from the active sites of its two levels."""
    height, width = masks[key.source].shape
    out_height, out_width = masks[key.target].shape
    _check_geometry(key, (height, width), (out_height, out_width))
    site_count = height * width

    y = _positions(rows_out // out_width, key, 0)[:, :, None]  # [N_out, kh, 1]
    x = _positions(rows_out % out_width, key, 1)[:, None, :]  # [N_out, 1, kw]
    inside = (y >= 0) & (y < height * key.upsample) & (x >= 0) & (x < width * key.upsample)
    site = (y // key.upsample) * width + x // key.upsample
    # Reads outside the map go to one site behind the last, which becomes the zero site.
    site = torch.where(inside, site, site_count).flatten(1)  # [N_out, K]

    is_ring = torch.zeros(site_count + 1, dtype=torch.bool)
    is_ring[site.flatten()] = True
    is_ring[rows_in] = False
    is_ring[site_count] = False
    ring = is_ring.nonzero().flatten()

    position = torch.empty(site_count + 1, dtype=torch.int64)
    position[rows_in] = torch.arange(rows_in.shape[0])
    position[ring] = torch.arange(rows_in.shape[0], rows_in.shape[0] + ring.shape[0])
    position[site_count] = rows_in.shape[0] + ring.shape[0]
    return ring, position[site]


def _positions(coordinate: Tensor, key: ConvKey, axis: int) -> Tensor:
    """Where output ``coordinate`` ``[N]`` reads along one axis of the upsampled source: ``[N, kernel]``."""
    offsets = torch.arange(key.kernel[axis]) * key.dilation[axis] - key.padding[axis]
    return coordinate[:, None] * key.stride[axis] + offsets
