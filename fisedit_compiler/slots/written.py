"""A slot that edits wrote rows of: the rows of every turn, to be put over the value that was there before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fisedit_compiler.slots.row_form import RowForm
from fisedit_compiler.slots.turn import Turn


@dataclass(slots=True, eq=False)
class WrittenRows:
    """Rows that one turn wrote, in the order of its sites. Nobody changes it: freezing it would take time.

    Attributes:
        turn: says which sites.
        rows: their values.
    """

    turn: Turn
    rows: Tensor


@dataclass(slots=True, eq=False)
class Written:
    """What edits wrote of a slot. Nobody changes it: two hundred are made at every call, beside a GPU that waits.

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
        kept = self._kept(newest)
        return Written(self.form, kept) if type(self) is Written else replace(self, by_turn=kept)

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
