"""What was rewritten, what was refused and why, and in what blocks the convolutions run, as text for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fisedit_compiler.kernels.block_costs import fits
from fisedit_compiler.kernels.patches import BLOCK_SIZES

if TYPE_CHECKING:
    from fisedit_compiler.program import CompiledProgram
    from fisedit_compiler.runtime.block_sizes import BlockSizes
    from fisedit_compiler.runtime.site_plan import SitePlan


def explain_program(program: CompiledProgram) -> str:
    """How many convolutions are sparse, and every operation that stays dense with its reason."""
    inputs = ", ".join(program.spatial)
    lines = [
        f"program for {inputs}: {len(program.layers)} sparse convolutions, {len(program.slots)} recorded values a "
        f"call, {len(program.refusals)} operations stay dense"
    ]
    lines += [f"  {path or name}: {operation}: {reason}" for name, path, operation, reason in program.refusals]
    return "\n".join(lines)


def explain_blocks(sizes: BlockSizes, plan: SitePlan, batch: int, element_size: int, device_type: str) -> str:
    """Per level the active sites, the block size, and what every size is estimated to cost.

    Args:
        sizes: the program's convolutions.
        plan: a plan in blocks, on any device.
        batch: samples of a call.
        element_size: bytes of an element.
        device_type: ``torch.device.type`` of where the convolutions run.
    """
    estimates = sizes.estimates(plan, batch, element_size, device_type)
    known = fits(device_type)
    shown = [f"{size} ({known[size].path})" if size in known else str(size) for size in BLOCK_SIZES]
    lines = [
        f"convolutions of {plan.area:.1%} active sites, batch {batch}, on {device_type}; microseconds estimated by "
        "block size" + ("" if known else " (nobody measured this device type: size 1)"),
        _line(["level", "active", "of", "size", *shown]),
    ]
    for level in sizes.levels:
        height, width = plan.size(level)
        costs = (f"{estimates[level][size]:.0f}" if size in known else "-" for size in BLOCK_SIZES)
        lines.append(
            _line([str(level), str(plan.rows(level)), str(height * width), str(plan.block_size(level)), *costs])
        )
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "  " + " ".join(f"{cell:>{width}}" for cell, width in zip(cells, (6, 8, 8, 5, 12, 12, 12, 12), strict=True))
