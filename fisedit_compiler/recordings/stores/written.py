"""A slot that edits wrote rows of: the rows of every turn, to be put over the value that was there before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fisedit_compiler.kernels.recentre_site_sums import recentre_site_sums
from fisedit_compiler.recordings.row_form import RowForm
from fisedit_compiler.recordings.stores.turn import Turn


@dataclass(frozen=True, eq=False)
class WrittenRows:
    """Rows that one turn wrote, in the order of its sites.

    Attributes:
        turn: says which sites.
        rows: their values.
        centre: of site sums, the statistics they are centred on.
    """

    turn: Turn
    rows: Tensor
    centre: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Written:
    """What edits wrote of a slot.

    Attributes:
        form: how rows lie in its value.
        by_turn: what each turn wrote, the oldest first.
    """

    form: RowForm
    by_turn: tuple[WrittenRows, ...]

    def over(self, root: Tensor) -> Tensor:
        """The value after the last turn, a new tensor: ``root`` is the value before the first one."""
        return self._written(root, [written.rows for written in self.by_turn])

    def after(self, newest: WrittenRows) -> Written:
        """The same with one more turn. Rows that it covers are not kept."""
        return replace(self, by_turn=self._kept(newest))

    def tensors(self) -> Iterator[Tensor]:
        """Everything that is kept alive to read it, besides the root."""
        yield from (written.rows for written in self.by_turn)

    def _kept(self, newest: WrittenRows) -> tuple[WrittenRows, ...]:
        level = self.form.level
        return (*(known for known in self.by_turn if not newest.turn.covers(known.turn, level)), newest)

    def _written(self, root: Tensor, rows: list[Tensor]) -> Tensor:
        form, newest = self.form, self.by_turn[-1].turn
        if len(rows) == 1:
            return form.write(root, newest.sites[form.level], rows[0])
        sites, source = newest.merged(tuple(written.turn for written in self.by_turn), form.level)
        return form.write(root, sites, torch.cat(rows, form.dim).index_select(form.dim, source))


@dataclass(frozen=True, eq=False)
class WrittenSums(Written):
    """What edits wrote of site sums.

    Sums are centred on a mean that every edit moves, also where it writes nothing. So the root and each turn's rows
    stay centred on what they were measured about, and are centred anew when they are read.

    Attributes:
        centre: statistics that the root is centred on, float32 ``[B, G, 2]``.
        target: statistics to centre on.
        channels: of all groups together.
    """

    centre: Tensor
    target: Tensor
    channels: int

    def over(self, root: Tensor) -> Tensor:
        """The sums float32 ``[B, S, G, 2]`` about the mean of ``target``."""
        rows = [self._about_target(written.rows, written.centre) for written in self.by_turn]
        return self._written(self._about_target(root, self.centre), rows)

    def centred_on(self, target: Tensor) -> WrittenSums:
        """The same about another mean."""
        return replace(self, target=target)

    def tensors(self) -> Iterator[Tensor]:
        """Everything that is kept alive to read it besides the root, the small centres included."""
        yield from super().tensors()
        yield self.centre
        yield self.target
        yield from (written.centre for written in self.by_turn if written.centre is not None)

    def _about_target(self, sums: Tensor, centre: Tensor | None) -> Tensor:
        assert centre is not None, "rows of site sums know what they are centred on"
        return sums if centre is self.target else recentre_site_sums(sums, centre, self.target, self.channels)
