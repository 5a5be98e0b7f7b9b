"""A mask at every level as drawings: active sites, the ring that convolutions read, and the blocks they run in."""

from __future__ import annotations

from fractions import Fraction

import torch

from fisedit_compiler.geometry.site_plan import SitePlan

_SIDE = 240
_ACTIVE, _RING, _IDLE = "#2b8a3e", "#ffd43b", "#f1f3f5"


def draw_pyramid(plan: SitePlan) -> str:
    """One picture a level, side by side, as HTML."""
    return "\n".join(_level(plan, level) for level in sorted(plan.active))


def _level(plan: SitePlan, level: Fraction) -> str:
    height, width = plan.size(level)
    kinds = torch.zeros(height * width, dtype=torch.uint8)
    for key, sites in plan.ring.items():
        if key.source == level:
            kinds[sites.cpu()] = 1
    kinds[plan.active[level].cpu()] = 2
    size = plan.block_size(level)
    cell = _SIDE / max(height, width)
    parts = [f'<rect width="{width * cell:.1f}" height="{height * cell:.1f}" fill="{_IDLE}"/>']
    parts += _runs(kinds.view(height, width), cell)
    if size > 1:
        parts += _grid(height, width, size, cell)
    active, ring = int((kinds == 2).sum()), int((kinds == 1).sum())
    caption = (
        f"level {level}: {height} x {width} sites, {active} active ({active / (height * width):.1%}), "
        f"{ring} in rings, blocks of {size}"
    )
    svg = "".join(parts)
    box = f"{width * cell:.1f} {height * cell:.1f}"
    return (
        f'<figure><svg xmlns="http://www.w3.org/2000/svg" width="{width * cell:.0f}" height="{height * cell:.0f}" '
        f'viewBox="0 0 {box}" shape-rendering="crispEdges">{svg}</svg><figcaption>{caption}</figcaption></figure>'
    )


def _runs(kinds: torch.Tensor, cell: float) -> list[str]:
    """Neighbours of one kind in a row are one rectangle."""
    parts = []
    for row, line in enumerate(kinds.tolist()):
        start = 0
        for column in range(1, len(line) + 1):
            if column < len(line) and line[column] == line[start]:
                continue
            if line[start]:
                colour = _ACTIVE if line[start] == 2 else _RING
                parts.append(
                    f'<rect x="{start * cell:.1f}" y="{row * cell:.1f}" width="{(column - start) * cell:.1f}" '
                    f'height="{cell:.1f}" fill="{colour}"/>'
                )
            start = column
    return parts


def _grid(height: int, width: int, size: int, cell: float) -> list[str]:
    lines = [
        f'<path d="M{column * cell:.1f} 0V{height * cell:.1f}" stroke="#495057" stroke-width="0.5"/>'
        for column in range(0, width, size)
    ]
    lines += [
        f'<path d="M0 {row * cell:.1f}H{width * cell:.1f}" stroke="#495057" stroke-width="0.5"/>'
        for row in range(0, height, size)
    ]
    return lines
