"""The index tables of one mask at every level: active sites, rings, and what convolutions read.

Pure geometry: no tensor of a model and no recording may appear here. A plan is built once per mask (a few
milliseconds on the CPU), serves every call of a run, and describes and draws itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fisedit_compiler.errors import MaskError, PlanError
from fisedit_compiler.geometry.conv_tables import ConvKey, patch_table, tabulate
from fisedit_compiler.geometry.inverse_table import inverse_table
from fisedit_compiler.geometry.patches import BLOCK_SIZES
from fisedit_compiler.graph.layout import Layout
from fisedit_compiler.masks import grown

_SHADES = "·░▒▓█"


@dataclass(frozen=True, eq=False, repr=False)
class SitePlan:
    """Which sites an edit computes at every level, and where each convolution output reads its inputs.

    Built by ``SitePlan.build``. Invariant: the parents of an active site are active at every coarser level.

    Attributes:
        height: rows of the level-1 lattice.
        width: columns of the level-1 lattice.
        active: per level, the active sites as int64 ``[N_s]``, ascending in row-major order.
        ring: per convolution, the inactive source sites that are read, int64 ``[R]``, ascending.
        taps: per convolution, int64 ``[N_out, K]`` into ``[rows (N_in), canvas[:, ring] (R), a zero site]``; at a
            level of larger blocks ``[blocks, p*p]``, the patch that each block reads. What a patch covers and no
            active output reads is the zero site.
        places: per level, int64 ``[N_s]``: where in the ``blocks*b*b`` outputs of its blocks each active site is.
        block_sizes: per level ``b``, the sites along a block's side; 1 where none is named.
    """

    height: int
    width: int
    active: Mapping[Fraction, Tensor]
    ring: Mapping[ConvKey, Tensor] = field(default_factory=dict)
    taps: Mapping[ConvKey, Tensor] = field(default_factory=dict)
    places: Mapping[Fraction, Tensor] = field(default_factory=dict)
    block_sizes: Mapping[Fraction, int] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        mask: Tensor,
        levels: Iterable[Fraction],
        convs: Iterable[ConvKey],
        *,
        dilation: int = 0,
        dense_levels: Collection[Fraction] = (),
        block_sizes: Mapping[Fraction, int] | None = None,
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
            block_sizes: per level, the size of the blocks that its convolutions are computed in, see ``blocked``.
            device: where the tables go; they are built on the CPU.

        Raises:
            MaskError: the mask is not a bool matrix with at least one site.
            PlanError: a level does not divide the mask's size, a convolution contradicts its levels, or a block size
                is not one of ``BLOCK_SIZES``.
        """
        _check_mask(mask)
        if dilation < 0:
            raise PlanError(f"dilation is {dilation}; it is a number of sites, 0 or more")
        mask = grown(mask.detach().cpu(), dilation)
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
            ring[key], taps[key] = tabulate(key, active[key.source], active[key.target], masks)
        places = {level: torch.arange(table.shape[0], device=table.device) for level, table in active.items()}
        plan = cls(height, width, active, ring, taps, places)
        if block_sizes:
            plan = plan.blocked(block_sizes)
        return plan if torch.device(device).type == "cpu" else plan.to(device)

    def to(self, device: torch.device | str) -> SitePlan:
        """The same plan with its tables on ``device``."""

        def move(tables: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
            return {key: table.to(device) for key, table in tables.items()}

        return replace(
            self, active=move(self.active), ring=move(self.ring), taps=move(self.taps), places=move(self.places)
        )

    def blocked(self, sizes: Mapping[Fraction, int]) -> SitePlan:
        """The same plan, its convolutions computed in blocks.

        Results are those of size 1 up to rounding: blocks copy less of what they read and compute outputs that nobody
        asked for. A 1x1 convolution stays at size 1, where it copies nothing twice.

        Args:
            sizes: per level the sites along a block's side, one of ``BLOCK_SIZES``; 1 for levels that are not named.

        Raises:
            PlanError: a size is none of these, or this plan has blocks already.
        """
        unknown = {level: size for level, size in sizes.items() if size not in BLOCK_SIZES}
        if unknown:
            level, size = next(iter(unknown.items()))
            raise PlanError(f"block size {size} at level {level} is none of {', '.join(map(str, BLOCK_SIZES))}")
        if self.block_sizes:
            raise PlanError("this plan has blocks already; build one without block_sizes, then call blocked")
        convolved = {key.target for key in self.taps if key.in_blocks}
        larger = {level: size for level, size in sizes.items() if size > 1 and level in convolved}
        blocks = {level: self._blocks(level, size) for level, size in larger.items()}
        places = {**self.places, **{level: place for level, (_, place) in blocks.items()}}
        taps = dict(self.taps)
        for key in self.taps:
            if key.in_blocks and key.target in larger:
                size, found = larger[key.target], blocks[key.target][0]
                source = self.size(key.source)
                taps[key] = patch_table(key, size, found, source, self.active[key.source], self.ring[key])
        return replace(self, taps=taps, places=places, block_sizes=larger)

    def block_size(self, level: Fraction) -> int:
        """Sites along the side of a block of ``level``."""
        return self.block_sizes.get(level, 1)

    @property
    def blocks(self) -> Mapping[Fraction, int]:
        """Number of blocks per level of blocks larger than 1."""
        keys = (key for key in self.taps if key.in_blocks and self.block_size(key.target) > 1)
        return {key.target: self.taps[key].shape[0] for key in keys}

    def block_count(self, level: Fraction, size: int) -> int:
        """Blocks of ``size`` by ``size`` sites that cover the active sites of ``level``."""
        if size == 1:
            return self.rows(level)
        height, width = self.size(level)
        # In numpy: a choice of sizes asks a dozen times between a mask and its first call, and torch's calls add up.
        y, x = np.divmod(self._active_at(level).cpu().numpy(), width)
        across = -(-width // size)
        covered = np.zeros(-(-height // size) * across, dtype=bool)
        covered[(y // size) * across + x // size] = True
        return int(np.count_nonzero(covered))

    def _blocks(self, level: Fraction, size: int) -> tuple[Tensor, Tensor]:
        """Blocks with an active site: their rows and columns ``[blocks, 2]``, and the place of each active site."""
        width = self.size(level)[1]
        active = self._active_at(level)
        y, x = active // width, active % width
        across = -(-width // size)
        found, block = torch.unique((y // size) * across + x // size, return_inverse=True)
        places = block * size * size + (y % size) * size + x % size
        return torch.stack([found // across, found % across], 1), places

    @cached_property
    def inverse(self) -> Mapping[Fraction, Tensor]:
        """Per level, int32 ``[H_s*W_s]``: the row of every active site, -1 elsewhere."""
        tables = {}
        for level, active in self.active.items():
            height, width = self.size(level)
            tables[level] = inverse_table(active, height * width)
        return tables

    def padded(
        self,
        rows: Mapping[Fraction, int],
        rings: Mapping[ConvKey, int],
        blocks: Mapping[Fraction, int] | None = None,
    ) -> SitePlan:
        """The same plan with more rows: the last active site, ring site and block are repeated.

        Repeated rows compute the same values once more, so whatever is written from them is the same. Ops that sum
        over rows or attend among them count every site once (``kernels/padding.py``).

        Args:
            rows: per level, the number of rows to have, at least as many as there are.
            rings: per convolution, the number of ring sites to have, likewise.
            blocks: per level of blocks larger than 1, the number of blocks to have, likewise; as many as there are
                where none is named.
        """
        blocks = blocks or {}
        active = {level: _repeat_last(table, rows[level]) for level, table in self.active.items()}
        ring = {key: _repeat_last(table, rings[key]) for key, table in self.ring.items()}
        taps = {}
        for key, table in self.taps.items():
            inputs, ring_size = self.rows(key.source), self.ring[key].shape[0]
            ring_index = table - inputs + rows[key.source]
            moved = torch.where(table < inputs, table, ring_index)
            moved = torch.where(table == inputs + ring_size, rows[key.source] + rings[key], moved)
            if not key.in_blocks or self.block_size(key.target) == 1:
                taps[key] = _repeat_last(moved, rows[key.target])
            else:
                taps[key] = _repeat_last(moved, blocks.get(key.target, table.shape[0]))
        places = {level: _repeat_last(table, rows[level]) for level, table in self.places.items()}
        return replace(self, active=active, ring=ring, taps=taps, places=places)

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

    def selector(self, layout: Layout) -> Tensor:
        """The active sites as a bool tensor that broadcasts against a dense map or tokens of ``layout``."""
        assert layout.level is not None, layout
        return layout.spread(self.active_mask(layout.level))

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
            size = self.block_size(level)
            in_blocks = "" if size == 1 else f", in blocks of {size}x{size}"
            lines.append(f"  level {level!s:>4}: {rows:>6} of {height * width:>6} sites ({share:6.1%}){in_blocks}")
        for key in sorted(self.taps, key=lambda key: (key.source, key.target, str(key))):
            ring, (lines_read, columns) = self.ring[key].shape[0], self.taps[key].shape
            reads = f"{lines_read} outputs x {columns} taps"
            if key.in_blocks and self.block_size(key.target) > 1:
                patch = "x".join(map(str, key.patch(self.block_size(key.target))))
                reads = f"{self.rows(key.target)} outputs in {lines_read} blocks x {patch} sites"
            lines.append(f"  conv {key}: {reads}, ring {ring}")
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


def _mask_at(mask: Tensor, level: Fraction) -> Tensor:
    """The level-1 mask at another level: any below for coarser levels, repeated for finer ones."""
    height, width = _size_at(mask.shape[0], mask.shape[1], level)
    if level >= 1:
        factor = level.numerator
        return mask.reshape(height, factor, width, factor).any(dim=3).any(dim=1)
    factor = level.denominator
    return mask.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
