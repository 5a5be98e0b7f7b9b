"""What a CUDA graph returns, as tensors of the caller's own: copied out of the graph's memory in one launch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fisedit_compiler.kernels.addresses import WORD, runs_of
from fisedit_compiler.runtime.execution.padded_plans import PaddedPlan

if TYPE_CHECKING:
    from fisedit_compiler.kernels.triton.copy_out import CopyOut

Strides = tuple[int, ...]


class OwnedOutputs:
    """Copies of a graph's outputs, without the rows that padding repeats. Each has a storage of its own."""

    def __init__(self, rows: Mapping[int, tuple[int, Fraction]]) -> None:
        """``rows`` says which outputs are rows, by position: on which axis, and of which level's active sites."""
        self.rows = rows
        self._plan: PaddedPlan | None = None
        self._unread: frozenset[int] = frozenset()
        self._are_rows: set[int] = set()
        self._views: list[Tensor] = []
        self._together: dict[int, Strides] = {}
        self._copier: CopyOut | None = None

    def of(self, outputs: Sequence[Tensor], prepared: PaddedPlan, unread: frozenset[int] = frozenset()) -> list[Tensor]:
        """Copies of what a replay wrote; ``outputs`` are the graph's, always the same ones.

        ``unread`` are the positions of those that are not wanted: the others follow each other in their order.
        """
        if self._plan is not prepared or self._unread != unread:
            self._prepare(outputs, prepared, unread)
        owned = [
            torch.empty_strided(view.shape, strides, dtype=view.dtype, device=view.device)
            if (strides := self._together.get(position)) is not None
            else view.clone(
                memory_format=torch.contiguous_format if position in self._are_rows else torch.preserve_format
            )
            for position, view in enumerate(self._views)
        ]
        if self._copier is not None:
            self._copier.run([owned[position] for position in self._together])
        return owned

    def _prepare(self, outputs: Sequence[Tensor], prepared: PaddedPlan, unread: frozenset[int]) -> None:
        wanted = [place for place in range(len(outputs)) if place not in unread]
        self._views = [self._view(place, outputs[place], prepared) for place in wanted]
        self._are_rows = {position for position, place in enumerate(wanted) if place in self.rows}
        found = {position: runs_of(view) for position, view in enumerate(self._views)}
        runs = {n: each for n, each in found.items() if each is not None and not self._views[n].element_size() % WORD}
        if len(runs) < 2:  # a copy of its own is as good
            runs = {}
        self._together = {position: each.strides for position, each in runs.items()}
        self._copier = None
        if runs:
            from fisedit_compiler.kernels.triton import copy_out

            self._copier = copy_out.CopyOut([self._views[position] for position in runs], list(runs.values()))
        self._plan, self._unread = prepared, unread

    def _view(self, place: int, output: Tensor, prepared: PaddedPlan) -> Tensor:
        if place not in self.rows:
            return output
        axis, level = self.rows[place]
        return output.narrow(axis, 0, prepared.counts[level])
