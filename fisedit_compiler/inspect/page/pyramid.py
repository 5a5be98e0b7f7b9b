"""A mask at every level as drawings: active sites, the ring that convolutions read, and the blocks they run in."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from markupsafe import Markup

from fisedit_compiler.geometry.site_plan import SitePlan
from fisedit_compiler.pages import render

_SIDE = 240
_IDLE, _RING, _ACTIVE = range(3)
_COLOURS = ("#f1f3f5", "#ffd43b", "#2b8a3e")
"""Of idle sites, of the ring, of active sites."""


@dataclass(frozen=True)
class Run:
    """Neighbours of one kind in a row: one rectangle."""

    row: int
    start: int
    length: int
    kind: int


@dataclass(frozen=True)
class Level:
    """One picture: the sites of a level, ``cell`` pixels each, its counts, and its blocks of ``block`` by ``block``."""

    level: Fraction
    height: int
    width: int
    cell: float
    runs: list[Run]
    active: int
    ring: int
    block: int


def draw_pyramid(plan: SitePlan) -> Markup:
    """One picture a level, side by side, as HTML."""
    levels = [_level(plan, level) for level in sorted(plan.active)]
    return render(__package__, "pyramid.html", levels=levels, colours=_COLOURS)


def _level(plan: SitePlan, level: Fraction) -> Level:
    height, width = plan.size(level)
    kinds = torch.zeros(height * width, dtype=torch.uint8)
    for key, sites in plan.ring.items():
        if key.source == level:
            kinds[sites.cpu()] = _RING
    kinds[plan.active[level].cpu()] = _ACTIVE
    return Level(
        level=level,
        height=height,
        width=width,
        cell=_SIDE / max(height, width),
        runs=_runs(kinds.view(height, width)),
        active=int((kinds == _ACTIVE).sum()),
        ring=int((kinds == _RING).sum()),
        block=plan.block_size(level),
    )


def _runs(kinds: torch.Tensor) -> list[Run]:
    runs = []
    for row, line in enumerate(kinds.tolist()):
        start = 0
        for column in range(1, len(line) + 1):
            if column < len(line) and line[column] == line[start]:
                continue
            if line[start] != _IDLE:
                runs.append(Run(row, start, column - start, line[start]))
            start = column
    return runs
