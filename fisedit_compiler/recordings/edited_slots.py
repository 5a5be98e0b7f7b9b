"""The slots of an edited call as a view of its base's: what the edit wrote, over what it left alone.

An edit writes the active rows of canvases and small values such as statistics. A view keeps these and shares all
other tensors with the recording that was edited. A slot that was written to is put together when somebody reads it,
and the result is not kept. Views do not refer to each other but to tensors, so dropping a recording frees exactly
what no other one needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

import torch
from torch import Tensor

from fisedit_compiler.graph.layout import SITES, Layout
from fisedit_compiler.kernels.recentre_site_sums import recentre_site_sums
from fisedit_compiler.recordings.slot_table import LazySlots, SlotTable

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


@dataclass(frozen=True)
class RowForm:
    """Where the rows of a slot lie in its value.

    Attributes:
        level: whose sites they are.
        layout: of a value that is a map or tokens as the model has it; ``None`` for a packed one.
        dim: the site axis of the rows, and of a packed value.
    """

    level: Fraction
    dim: int
    layout: Layout | None = None

    @classmethod
    def dense(cls, layout: Layout) -> RowForm:
        """The form of a value that is not packed; height and width become one axis where the first of them is."""
        assert layout.is_rows and layout.level is not None, layout
        return cls(layout.level, flat_axes(layout).index(SITES), layout)

    def flat(self, value: Tensor) -> Tensor:
        """``value`` with one site axis, ``dim``."""
        if self.layout is None or self.layout.kind == "tokens":
            return value
        return value.permute(_adjacent(self.layout)).flatten(self.dim, self.dim + 1)

    def gather(self, value: Tensor, sites: Tensor) -> Tensor:
        """The rows of some sites of a value."""
        return self.flat(value).index_select(self.dim, sites)

    def write(self, value: Tensor, sites: Tensor, rows: Tensor) -> Tensor:
        """A copy of ``value`` whose rows of ``sites`` are ``rows``."""
        written = self.flat(value).index_copy(self.dim, sites, rows)
        if self.layout is None or self.layout.kind == "tokens":
            return written
        height, width = self.layout.axes
        written = torch.unflatten(written, self.dim, (value.shape[height], value.shape[width]))
        order = _adjacent(self.layout)
        return written.permute([order.index(axis) for axis in range(len(order))])


def flat_axes(layout: Layout) -> list[int]:
    """The axes of a dense value with one site axis: which dense axis each is, :data:`SITES` for the sites."""
    if layout.kind == "tokens":
        return [SITES if axis == layout.axes[0] else axis for axis in range(layout.rank)]
    axes = _adjacent(layout)
    start = axes.index(layout.axes[0])
    return [*axes[:start], SITES, *axes[start + 2 :]]


def _adjacent(layout: Layout) -> list[int]:
    """The order of axes in which a map's width follows its height: its own, or both behind the others."""
    height, width = layout.axes
    if width == height + 1:
        return list(range(layout.rank))
    return [*(axis for axis in range(layout.rank) if axis not in layout.axes), height, width]


@dataclass(frozen=True, eq=False)
class Patch:
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
    """A slot that edits wrote rows of.

    Attributes:
        root: the value before the first of them; never written to.
        form: how rows lie in it.
        patches: what each turn wrote, the oldest first.
    """

    root: Tensor
    form: RowForm
    patches: tuple[Patch, ...]

    def read(self) -> Tensor:
        """The value after the last turn: a new tensor."""
        return self._written(self.root, [patch.rows for patch in self.patches])

    def after(self, patch: Patch) -> Written:
        """The same with one more turn. Rows that it covers are not kept."""
        return replace(self, patches=self._kept(patch))

    def tensors(self) -> Iterator[Tensor]:
        """Everything that is kept alive to read it."""
        yield self.root
        yield from (patch.rows for patch in self.patches)

    def _kept(self, patch: Patch) -> tuple[Patch, ...]:
        level = self.form.level
        return (*(known for known in self.patches if not patch.turn.covers(known.turn, level)), patch)

    def _written(self, root: Tensor, rows: list[Tensor]) -> Tensor:
        form, newest = self.form, self.patches[-1].turn
        if len(rows) == 1:
            return form.write(root, newest.sites[form.level], rows[0])
        sites, source = newest.merged(tuple(patch.turn for patch in self.patches), form.level)
        return form.write(root, sites, torch.cat(rows, form.dim).index_select(form.dim, source))


@dataclass(frozen=True, eq=False)
class WrittenSums(Written):
    """Site sums that edits wrote rows of.

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

    def read(self) -> Tensor:
        """The sums float32 ``[B, S, G, 2]`` about the mean of ``target``."""
        rows = [self._about_target(patch.rows, patch.centre) for patch in self.patches]
        return self._written(self._about_target(self.root, self.centre), rows)

    def centred_on(self, target: Tensor) -> WrittenSums:
        """The same about another mean."""
        return replace(self, target=target)

    def tensors(self) -> Iterator[Tensor]:
        """Everything that is kept alive to read it, the small centres included."""
        yield from super().tensors()
        yield self.centre
        yield self.target
        yield from (patch.centre for patch in self.patches if patch.centre is not None)

    def _about_target(self, sums: Tensor, centre: Tensor | None) -> Tensor:
        assert centre is not None, "rows of site sums know what they are centred on"
        return sums if centre is self.target else recentre_site_sums(sums, centre, self.target, self.channels)


Entry = Tensor | Written


class EditedSlots(LazySlots):
    """Slots by name: those of the edited call, with what one edit changed.

    Attributes:
        own: the tensors that this edit added, each once.
    """

    def __init__(
        self,
        base: Mapping[str, Tensor],
        changes: Mapping[str, Entry],
        own: Iterable[Tensor],
        names: Iterable[str] | None = None,
    ) -> None:
        """A view.

        Args:
            base: slots of the edited call, which may be such a view itself.
            changes: what the edit changed.
            own: the tensors among ``changes`` that are not the base's.
            names: the slots to have, each in ``changes`` or the base; by default the base's.
        """
        known = entries_of(base)
        kept = known if names is None else names
        self._entries: dict[str, Entry] = {n: changes[n] if n in changes else known[n] for n in kept}
        self.own = tuple({tensor.untyped_storage().data_ptr(): tensor for tensor in own}.values())
        self._plain: SlotTable | None = None

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        return entry.read() if isinstance(entry, Written) else entry

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def entries(self) -> Mapping[str, Entry]:
        """What each slot is made of."""
        return self._entries

    @property
    def own_nbytes(self) -> int:
        """Bytes that this edit added. The index tables of a turn, shared by all its slots and calls, do not count."""
        return sum(tensor.nbytes for tensor in self.own)

    def tensors(self) -> Iterator[Tensor]:
        """Everything that is kept alive by this view; a tensor may come more than once."""
        for entry in self._entries.values():
            if isinstance(entry, Written):
                yield from entry.tensors()
            else:
                yield entry

    def table(self) -> SlotTable:
        """All slots at once; kept if nothing had to be put together for it."""
        if self._plain is not None:
            return self._plain
        table = SlotTable(self)
        if not any(isinstance(entry, Written) for entry in self._entries.values()):
            self._plain = table
        return table


def entries_of(slots: Mapping[str, Tensor]) -> Mapping[str, Entry]:
    """What the slots of a call are made of, without putting anything together."""
    return slots.entries if isinstance(slots, EditedSlots) else slots
