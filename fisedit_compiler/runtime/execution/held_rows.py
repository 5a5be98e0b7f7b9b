"""What comes up from coarser levels, as the last full call of an edit computed it, for its shallow calls.

A run has one of these. Nothing is copied and nothing is shared between runs: the rows are those of the run's own sites,
for all samples of its batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fisedit_compiler.geometry.site_plan import SitePlan
from fisedit_compiler.lowering.program import CompiledProgram
from fisedit_compiler.passes.programs.reuse import Cut


class HeldRows:
    """The rows at the cut of a program, kept from one call to the next."""

    def __init__(self) -> None:
        self._rows: Mapping[str, Tensor] = {}
        self._made: tuple[CompiledProgram, SitePlan, torch.Size, torch.dtype] | None = None

    def drop(self) -> None:
        """Forget them: the next call is a full one."""
        self._rows, self._made = {}, None

    def keep(self, rows: Sequence[Tensor], program: CompiledProgram, plan: SitePlan, sample: Tensor) -> None:
        """Keep what a full call returned at the cut, padded or not."""
        self._rows = {value.origin: row for value, row in zip(cut_of(program).values, rows, strict=True)}
        self._made = (program, plan, sample.shape, sample.dtype)

    def fit(self, program: CompiledProgram, plan: SitePlan, sample: Tensor) -> bool:
        """Whether they are those of the same program, sites and samples."""
        made = self._made
        return made is not None and made[0] is program and made[1] is plan and made[2:] == (sample.shape, sample.dtype)

    def rows(self, program: CompiledProgram, plan: SitePlan, *, padded: bool) -> dict[str, Tensor]:
        """The rows by the name of the captured value.

        A CUDA graph gets them ``padded``, as it returned them. Others get the rows of the plan's sites.
        """
        rows = {}
        for value in cut_of(program).values:
            found = self._rows[value.origin]
            rows[value.origin] = found if padded else found.narrow(value.dim, 0, plan.active[value.level].shape[0])
        return rows


def cut_of(program: CompiledProgram) -> Cut:
    """The cut of a program that has one."""
    assert isinstance(program.cut, Cut), program.cut
    return program.cut
