"""What a CUDA graph returns, as tensors of the caller's own: copied out of the graph's memory in a launch or a few."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from fractions import Fraction
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fisedit_compiler.kernels.addresses import ALIGNMENT, TARGETS, WORD, Runs, runs_of
from fisedit_compiler.tensors.late import LateTensors

if TYPE_CHECKING:
    from fisedit_compiler.kernels.triton.copy_out import CopyOut

KEPT = 8
"""Numbers of rows for which it is kept how outputs are copied."""


class OwnedOutputs:
    """Copies of a graph's outputs, without the rows that padding repeats.

    Outputs that are said to be kept and dropped together share one piece of memory; each other one has its own.
    """

    def __init__(
        self, rows: Mapping[int, tuple[int, Fraction]], together: Mapping[int, Hashable] = MappingProxyType({})
    ) -> None:
        """``rows`` says which outputs are rows, by position: on which axis, and of which level's active sites.

        ``together`` gives, by position, a key that outputs have in common which live and die together.
        """
        self.rows, self.together = rows, together
        self._kept: OrderedDict[Hashable, _Copies] = OrderedDict()

    def of(
        self, outputs: Sequence[Tensor], counts: Mapping[Fraction, int], unread: frozenset[int] = frozenset()
    ) -> LateTensors:
        """Copies of what a replay wrote; ``outputs`` are the graph's, always the same ones.

        ``counts`` are the rows of each level that are not padding. ``unread`` are the positions of outputs that are not
        wanted: the others follow each other in their order.
        """
        key = (unread, *counts.items())
        copies = self._kept.get(key)
        if copies is None:
            copies = self._kept[key] = self._copies(outputs, counts, unread)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return copies.make()

    def _copies(self, outputs: Sequence[Tensor], counts: Mapping[Fraction, int], unread: frozenset[int]) -> _Copies:
        wanted = [place for place in range(len(outputs)) if place not in unread]
        views = [self._view(place, outputs[place], counts) for place in wanted]
        are_rows = {position for position, place in enumerate(wanted) if place in self.rows}
        together = {position: self.together[place] for position, place in enumerate(wanted) if place in self.together}
        return _Copies(views, are_rows, together)

    @staticmethod
    def rehearse() -> None:
        """Launch the kernel that copies, where launches are noted."""
        from fisedit_compiler.kernels.triton.copy_out import rehearse

        rehearse()

    def _view(self, place: int, output: Tensor, counts: Mapping[Fraction, int]) -> Tensor:
        if place not in self.rows:
            return output
        axis, level = self.rows[place]
        return output.narrow(axis, 0, counts[level])


class _Copies:
    """How some views of a graph's memory are copied: a few launches, each to a few pieces of memory."""

    def __init__(self, views: Sequence[Tensor], are_rows: set[int], together: Mapping[int, Hashable]) -> None:
        self.views = views
        self._are_rows = are_rows
        found = {position: runs_of(view) for position, view in enumerate(views)}
        runs = {n: each for n, each in found.items() if each is not None and not views[n].element_size() % WORD}
        if len(runs) < 2:  # a copy of its own is as good
            runs = {}
        pieces: dict[Hashable, list[int]] = {}
        self._alone: list[tuple[int, tuple[int, ...]]] = []
        for position, of_view in runs.items():
            if position in together:
                pieces.setdefault((views[position].dtype, together[position]), []).append(position)
            else:
                self._alone.append((position, of_view.strides))
        self._pieces = [_Piece(views, runs, positions) for positions in pieces.values()]
        self._apart = [position for position in range(len(views)) if position not in runs]
        self._nbytes = [view.nbytes for view in views]
        self._launches = self._launches_of(runs)

    def _launches_of(self, runs: Mapping[int, Runs]) -> list[tuple[int, CopyOut]]:
        # Each with the first of its targets. What goes to each, the pieces first: position and byte.
        targets: list[list[tuple[int, int]]] = [list(piece.places()) for piece in self._pieces]
        targets += [[(position, 0)] for position, _ in self._alone]
        if not targets:
            return []
        from fisedit_compiler.kernels.triton import copy_out

        launches = []
        for first in range(0, len(targets), TARGETS):
            chunk = enumerate(targets[first : first + TARGETS])
            jobs = [(position, number, byte) for number, places in chunk for position, byte in places]
            # One launch copies whole vectors, or word by word: a few odd rows must not slow all others down.
            whole = [position for position in runs if _is_of_vectors(self.views[position], runs[position])]
            for alike in (set(whole), runs.keys() - set(whole)):
                some = [job for job in jobs if job[0] in alike]
                if some:
                    views = [self.views[position] for position, *_ in some]
                    places = [(number, byte) for _, number, byte in some]
                    launches.append((first, copy_out.CopyOut(views, [runs[position] for position, *_ in some], places)))
        return launches

    def make(self) -> LateTensors:
        """The copies, in the order of the views."""
        made: list[Tensor | None] = [None] * len(self.views)
        memories = [piece.memory() for piece in self._pieces]
        targets = [*memories]
        for position, strides in self._alone:
            view = self.views[position]
            own = made[position] = torch.empty_strided(view.shape, strides, dtype=view.dtype, device=view.device)
            targets.append(own)
        for position in self._apart:
            kept = torch.contiguous_format if position in self._are_rows else torch.preserve_format
            made[position] = self.views[position].clone(memory_format=kept)
        for first, launch in self._launches:
            launch.run(targets[first : first + TARGETS])

        pieces = self._pieces  # what is made later keeps nothing of the graph's memory alive

        def make(row: list[Tensor | None]) -> None:
            for piece, memory in zip(pieces, memories, strict=True):
                piece.make(memory, row)

        return LateTensors(made, make, self._nbytes)


class _Piece:
    """Outputs of one dtype that share a piece of memory, in which those of equal shapes and strides lie side by side.

    Each begins where vectors may be loaded from, and is dense in the order of its runs.
    """

    def __init__(self, views: Sequence[Tensor], runs: Mapping[int, Runs], positions: Sequence[int]) -> None:
        first = views[positions[0]]
        self.dtype, self.device = first.dtype, first.device
        alike: dict[tuple[torch.Size, tuple[int, ...]], list[int]] = {}
        for position in positions:
            alike.setdefault((views[position].shape, runs[position].strides), []).append(position)
        self.size = 0
        self._stacks: list[tuple[list[int], tuple[int, ...], tuple[int, ...], int]] = []
        whole = ALIGNMENT // self.dtype.itemsize
        for (shape, strides), members in alike.items():
            step = -(-prod(shape) // whole) * whole
            self._stacks.append((members, (len(members), *shape), (step, *strides), self.size))
            self.size += len(members) * step

    def places(self) -> Iterator[tuple[int, int]]:
        """Every position, and the byte at which it lies."""
        for positions, _, strides, start in self._stacks:
            for number, position in enumerate(positions):
                yield position, (start + number * strides[0]) * self.dtype.itemsize

    def memory(self) -> Tensor:
        """New memory."""
        return torch.empty(self.size, dtype=self.dtype, device=self.device)

    def make(self, memory: Tensor, row: list[Tensor | None]) -> None:
        """Put the tensors in a piece of memory in their places of a row; one call makes all of a shape."""
        for positions, shape, strides, start in self._stacks:
            stack = memory.as_strided(shape, strides, start)
            for position, made in zip(positions, stack.unbind(), strict=True):
                row[position] = made


def _is_of_vectors(view: Tensor, runs: Runs) -> bool:
    """Whether each run begins where a vector may be loaded from, there and in a dense copy."""
    size = view.element_size()
    apart = len(runs.starts) == 1 or not runs.length * size % ALIGNMENT
    return apart and not view.data_ptr() % ALIGNMENT and not any(start * size % ALIGNMENT for start in runs.starts)
