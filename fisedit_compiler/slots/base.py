"""A recorded value, and what a kind of recorded values says of itself.

A kind says how its values are stored, what readers get of them, how an edit writes them, where their samples lie, and
what ``compiled.check()`` expects of them. Passes, recordings, sessions and ``inspect/`` ask; none of them knows a kind
by its name. Each kind has a file of its own here; other packages register theirs (``registry.py``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

from torch import Tensor, fx

from fisedit_compiler.graph.layout import Layout
from fisedit_compiler.graph.specs import ValueSpec
from fisedit_compiler.slots.asking import ask
from fisedit_compiler.slots.row_form import RowForm
from fisedit_compiler.slots.turn import Edit
from fisedit_compiler.slots.written import Written, WrittenRows

SlotNode = Callable[[str], fx.Node]
"""The node of another slot of the program, by the slot's name."""
LoadedNode = Callable[[str, ValueSpec], fx.Node]
"""The node of another slot of the program, by the slot's name and the spec of what readers get of it."""


@dataclass(frozen=True)
class Slot:
    """One recorded value. Its methods ask its kind, and refuse in words an answer that no slot can have.

    Attributes:
        name: place in the user's model, such as ``down_blocks.0.resnets.1.conv1.input``.
        origin: name of the dense node that produces the value.
        kind: how the value is stored, read and written.
        layout: layout of the dense value.
        of: name of another slot that this one is only right together with: site sums are centred on statistics.
    """

    name: str
    origin: str
    kind: SlotKind
    layout: Layout
    of: str = ""

    def store(self, graph: fx.Graph, value: fx.Node, other: SlotNode) -> fx.Node:
        """See :meth:`SlotKind.store`, as of all below."""
        return ask(self, "store", graph, self, value, other)

    def stored_spec(self, loaded: ValueSpec) -> ValueSpec:
        return ask(self, "stored_spec", self, loaded)

    def load(self, graph: fx.Graph, stored: fx.Node, loaded: ValueSpec, other: LoadedNode) -> fx.Node:
        return ask(self, "load", graph, self, stored, loaded, other)

    def store_rows(self, graph: fx.Graph, rows: fx.Node, other: SlotNode) -> fx.Node:
        return ask(self, "store_rows", graph, self, rows, other)

    def problem(self, value: ValueSpec, loaded: ValueSpec) -> str:
        return ask(self, "problem", self, value, loaded)

    def row_form(self) -> RowForm:
        return ask(self, "row_form", self)

    @cached_property
    def form(self) -> RowForm:
        """What :meth:`row_form` gives, asked for once."""
        return self.row_form()

    def written(self, before: Written | None, edit: Edit) -> Written:
        if type(self.kind).written is SlotKind.written:  # most do, and nothing that it does can go wrong
            return self.kind.written(self, before, edit)
        return ask(self, "written", self, before, edit)

    def batch_axes(self, axis: int) -> tuple[int | None, int | None] | None:
        return ask(self, "batch_axes", self, axis)

    def recorded(self, value: Tensor) -> Tensor:
        return ask(self, "recorded", self, value)

    def edited(self, base: Tensor, edited: Tensor) -> Tensor:
        return ask(self, "edited", self, base, edited)

    def read(self, stored: Tensor, slots: Mapping[str, Tensor]) -> Tensor:
        return ask(self, "read", self, stored, slots)

    def pinned(self, value: Tensor) -> Tensor:
        return ask(self, "pinned", self, value)


@dataclass(frozen=True)
class SlotKind(ABC):
    """How values are recorded.

    A kind that has parameters is a frozen dataclass; kinds of equal parameters are equal, and equal requests for a
    value share a slot. ``slot`` is always the slot in question. Whether the methods agree is tried on an example when a
    program with slots of the kind is compiled (``agreement/``).

    Attributes:
        name: what listings, pages and recordings call it.
        holds: whether what is stored is the dense ``value`` as it is, the value in ``packed`` form (a map as
            ``[B, S, C]``), something ``else`` that gives it back to readers, or what is only ``derived`` from it, such
            as statistics. Outputs are recorded as values; inputs are compared with packed ones.
        rounding: largest relative error, of a value's largest element, of what readers get back of what was recorded.
    """

    name: ClassVar[str]
    holds: ClassVar[Literal["value", "packed", "else", "derived"]] = "else"
    rounding: ClassVar[float] = 0.0

    # -- in graphs -------------------------------------------------------------------------------

    @abstractmethod
    def store(self, graph: fx.Graph, slot: Slot, value: fx.Node, other: SlotNode) -> fx.Node:
        """What the recording graph returns of a dense value; ``other`` gives what it returns of slot ``slot.of``."""

    def stored_spec(self, slot: Slot, loaded: ValueSpec) -> ValueSpec:
        """Spec of what is stored, where readers are to get ``loaded``."""
        return loaded

    def load(self, graph: fx.Graph, slot: Slot, stored: fx.Node, loaded: ValueSpec, other: LoadedNode) -> fx.Node:
        """What readers in a step graph get of what is stored, which is to be ``loaded``; ``other`` gives what they get
        of slot ``slot.of``."""
        return stored

    def store_rows(self, graph: fx.Graph, slot: Slot, rows: fx.Node, other: SlotNode) -> fx.Node:
        """What an edit keeps of the rows it computed; ``other`` gives what its readers got of slot ``slot.of``."""
        return rows

    def problem(self, slot: Slot, value: ValueSpec, loaded: ValueSpec) -> str:
        """Why no reader can get ``loaded`` of a dense ``value``, in words; empty if one can."""
        return ""

    # -- in recordings ---------------------------------------------------------------------------

    def row_form(self, slot: Slot) -> RowForm:
        """Where the rows of its sites lie in what is stored."""
        assert slot.layout.level is not None
        return RowForm(slot.layout.level, slot.layout.site_dim())

    def written(self, slot: Slot, before: Written | None, edit: Edit) -> Written:
        """What edits wrote of it: ``before`` with the rows of one more edit."""
        rows = WrittenRows(edit.turn, edit.updates[slot.name])
        # Asked of every slot of every call, beside a GPU that waits: nothing is made twice.
        return Written(slot.form, (rows,)) if before is None else before.after(rows)

    @abstractmethod
    def batch_axes(self, slot: Slot, axis: int) -> tuple[int | None, int | None] | None:
        """The axes that count samples in what is stored and in its rows, where ``axis`` does in the dense value.

        ``None`` if its samples cannot be told apart then.
        """

    # -- in checks, in plain PyTorch that shares nothing with the above ----------------------------

    @abstractmethod
    def recorded(self, slot: Slot, value: Tensor) -> Tensor:
        """What must be stored of a dense value."""

    def edited(self, slot: Slot, base: Tensor, edited: Tensor) -> Tensor:
        """What must be stored after an edit that made the dense value ``edited`` of ``base``."""
        return self.recorded(slot, edited)

    def read(self, slot: Slot, stored: Tensor, slots: Mapping[str, Tensor]) -> Tensor:
        """What readers get of what is stored; ``slots`` holds what is stored of all slots."""
        return stored

    def pinned(self, slot: Slot, value: Tensor) -> Tensor:
        """The dense value as readers get it back, at sites that an edit leaves alone."""
        return value
