"""Which sites one edit writes, and what a chain of edits wrote together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor

Merged = tuple[Tensor, Tensor]
"""Sites that a chain of turns wrote, and for each the row to take of all turns' rows one after another."""


@dataclass(eq=False)
class Turn:
    """The sites that one edit writes, per level int64 ``[N_s]`` ascending, on the device of the recording."""

    sites: Mapping[Fraction, Tensor]
    _covers: dict[tuple[Fraction, int], tuple[Tensor, bool]] = field(default_factory=dict, repr=False)
    _merged: dict[tuple[Fraction, tuple[Turn, ...]], Merged] = field(default_factory=dict, repr=False)

    def covers(self, earlier: Turn, level: Fraction) -> bool:
        """Whether this turn writes every site of ``level`` that ``earlier`` wrote: nobody reads those rows then."""
        mine, others = self.sites[level], earlier.sites[level]
        if mine is others:
            return True
        # The answer is asked for once per slot and call; the tensor is kept so that its id stays its own.
        known = self._covers.get((level, id(others)))
        if known is None:
            answer = others.shape[0] <= mine.shape[0] and bool(torch.isin(others, mine, assume_unique=True).all())
            known = self._covers[level, id(others)] = (others, answer)
        return known[1]

    def merged(self, turns: tuple[Turn, ...], level: Fraction) -> Merged:
        """What a chain of turns that ends with this one wrote, later turns over earlier ones."""
        key = (level, turns)
        if key not in self._merged:
            tables = [turn.sites[level].cpu() for turn in turns]
            last = max((int(table[-1]) for table in tables if table.numel()), default=-1)
            owner = torch.full((last + 1,), -1, dtype=torch.int64, device="cpu")
            start = 0
            for table in tables:
                owner[table] = torch.arange(start, start + table.shape[0], device="cpu")
                start += table.shape[0]
            sites = (owner >= 0).nonzero().flatten()
            device = self.sites[level].device
            self._merged[key] = (sites.to(device), owner[sites].to(device))
        return self._merged[key]


@dataclass(frozen=True, eq=False)
class Edit:
    """What one edited call wrote of its slots.

    Attributes:
        turn: the sites that rows belong to.
        base: slots of the call that was edited.
        updates: what the update graph returned, by slot.
    """

    turn: Turn
    base: Mapping[str, Tensor]
    updates: Mapping[str, Tensor]
