"""What the placeholders of a compiled graph stand for, and how their values are found for a call.

A placeholder's ``meta["input"]`` is one of the dataclasses below; each says where its value comes from
(:meth:`Input.of`). Captured graphs have none there: their placeholders are the call's own tensors, by name. A runner
reads the inputs of a graph once (:func:`graph_inputs`) and resolves them at every call (:func:`resolve`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, fx


@dataclass(frozen=True)
class Sources:
    """Where the inputs of one call come from; what a graph does not ask for may be left out.

    Attributes:
        call: the call's tensors, by placeholder name.
        slots: the recorded values, by slot name.
        hoisted: the hoisted values, by name.
        plan: the site plan: a mapping by key for the name of every table.
        batch: number of samples.
        columns: int64 ``[B, T]``, see :mod:`fisedit_compiler.passes.programs.maps`.
        addresses: int64 ``[slots]``, where the slots lie in memory.
        held: rows that an earlier call of the run computed, by the name of the captured value.
    """

    call: Mapping[str, Any] = field(default_factory=dict)
    slots: Mapping[str, Any] = field(default_factory=dict)
    hoisted: Mapping[str, Any] = field(default_factory=dict)
    plan: Any = None
    batch: int | None = None
    columns: Tensor | None = None
    addresses: Tensor | None = None
    held: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Input(ABC):
    """What a placeholder stands for. ``kind`` is its word in listings."""

    kind: ClassVar[str]

    @abstractmethod
    def of(self, sources: Sources) -> Any:
        """Its value for one call."""

    def __str__(self) -> str:
        return ", ".join([self.kind, *(str(getattr(self, item.name)) for item in fields(self))])


@dataclass(frozen=True)
class CallInput(Input):
    """A tensor of the call."""

    kind: ClassVar[str] = "call"
    name: str

    def of(self, sources: Sources) -> Any:
        return sources.call[self.name]


@dataclass(frozen=True)
class BatchInput(Input):
    """The number of samples."""

    kind: ClassVar[str] = "batch"

    def of(self, sources: Sources) -> Any:
        return sources.batch


@dataclass(frozen=True)
class SlotInput(Input):
    """A recorded value."""

    kind: ClassVar[str] = "slot"
    slot: str

    def of(self, sources: Sources) -> Any:
        return sources.slots[self.slot]


@dataclass(frozen=True)
class HoistedInput(Input):
    """A value that a bundle computes."""

    kind: ClassVar[str] = "hoisted"
    value: str

    def of(self, sources: Sources) -> Any:
        return sources.hoisted[self.value]


@dataclass(frozen=True)
class TableInput(Input):
    """An index table of the site plan: ``active``, ``inverse`` and ``places`` by level, ``ring`` and ``taps`` by
    geometry of a convolution."""

    kind: ClassVar[str] = "table"
    table: str
    key: Any

    def of(self, sources: Sources) -> Any:
        return getattr(sources.plan, self.table)[self.key]


@dataclass(frozen=True)
class ColumnsInput(Input):
    """For every token the column of the recorded cross-attention map that stands for its own, or -1."""

    kind: ClassVar[str] = "columns"

    def of(self, sources: Sources) -> Any:
        return sources.columns


@dataclass(frozen=True)
class HeldInput(Input):
    """Rows that an earlier call of the run computed, with the axis that counts sites."""

    kind: ClassVar[str] = "held"
    value: str
    dim: int

    def of(self, sources: Sources) -> Any:
        return sources.held[self.value]


# -- of staged steps (``lowering/stage.py``) -----------------------------------------------------


@dataclass(frozen=True)
class RingRowsInput(Input):
    """The rows of a recorded canvas ``[B, S, C]`` that a convolution reads: ``[B, R, C]``."""

    kind: ClassVar[str] = "ring_rows"
    slot: str
    key: Any

    def of(self, sources: Sources) -> Any:
        return sources.slots[self.slot].index_select(1, sources.plan.ring[self.key])


@dataclass(frozen=True)
class IotaInput(Input):
    """``0, 1, ...`` for the ring of a convolution, whose rows lie side by side: int64 ``[R]``."""

    kind: ClassVar[str] = "iota"
    key: Any

    def of(self, sources: Sources) -> Any:
        ring = sources.plan.ring[self.key]
        return torch.arange(ring.shape[0], device=ring.device)


@dataclass(frozen=True)
class AddressedInput(Input):
    """A recorded value of which only shape and strides are read: its elements are found by address."""

    kind: ClassVar[str] = "addressed"
    slot: str

    def of(self, sources: Sources) -> Any:
        return sources.slots[self.slot]


@dataclass(frozen=True)
class AddressInput(Input):
    """The table of addresses of the slots."""

    kind: ClassVar[str] = "addresses"

    def of(self, sources: Sources) -> Any:
        return sources.addresses


# -- reading and writing -------------------------------------------------------------------------


def resolve(inputs: Sequence[Input], sources: Sources) -> list[Any]:
    """A graph's arguments for one call, from what :func:`graph_inputs` told of it."""
    return [item.of(sources) for item in inputs]


def graph_inputs(graph: fx.Graph) -> tuple[Input, ...]:
    """What the placeholders of a graph stand for, in order."""
    return tuple(input_of(node) or CallInput(node.name) for node in graph.nodes if node.op == "placeholder")


def input_of(node: Any) -> Input | None:
    """What a node stands for, as a pass noted it; ``None`` for one that is computed, and in a captured graph."""
    return node.meta.get("input") if isinstance(node, fx.Node) else None


def slot_of(node: Any) -> str:
    """The slot whose recorded value a node stands for; empty if it stands for none."""
    item = input_of(node)
    return item.slot if isinstance(item, SlotInput) else ""


def loaded_slot(node: Any) -> str:
    """The slot whose value a node is as its readers get it: what is stored, or what was made of that; else empty."""
    return str(node.meta.get("loads", "")) or slot_of(node) if isinstance(node, fx.Node) else ""


def key_of(node: Any) -> Any:
    """The key of the index table that a node stands for.

    Raises:
        TypeError: it stands for none.
    """
    item = input_of(node)
    if not isinstance(item, TableInput):
        raise TypeError(f"{node} is no index table: it stands for {item}")
    return item.key


def placeholder(graph: fx.Graph, name: str, item: Input) -> fx.Node:
    """A new placeholder at the graph's insertion point."""
    node = graph.placeholder(name)
    node.meta["input"] = item
    return node
