"""Cache stores: the recording graph is the dense graph that also returns every slot some sparse operation loads.

Before: ``return y``
After:  ``return y, canvas(x1), group_norm_statistics(x2), ...`` in the order of the program's slots

Also the stores of an edit run (:func:`with_updates`): the step graph that also returns the rows that the edit writes,
so that an edit is itself a recording. What they are written over is shared with the recording of the base run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fisedit_compiler.graph import ir
from fisedit_compiler.graph.inputs import loaded_slot
from fisedit_compiler.kernels.traits import traits_of
from fisedit_compiler.passes.base import Program
from fisedit_compiler.passes.verify import verify_functional
from fisedit_compiler.slots.base import Slot

aten = torch.ops.aten
fisedit = torch.ops.fisedit


def recording_graph(program: Program) -> fx.Graph:
    """The dense graph with one more output per slot, flat: the model's own outputs first."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    outputs = graph.graph_copy(program.captured.graph, mapping)
    by_origin = {original.name: copied for original, copied in mapping.items()}
    stored: dict[str, fx.Node] = {}

    def store(name: str) -> fx.Node:
        if name not in stored:
            slot = program.slots[name]
            stored[name] = slot.store(graph, by_origin[slot.origin], store)
        return stored[name]

    for name in program.slots:
        store(name)
    graph.output((*_flat(outputs), *(stored[name] for name in program.slots)))
    graph.eliminate_dead_code()
    verify_functional(graph)
    graph.lint()
    return graph


def _flat(outputs: Any) -> tuple[Any, ...]:
    return tuple(outputs) if isinstance(outputs, (list, tuple)) else (outputs,)


@dataclass(frozen=True)
class SlotUpdate:
    """What the update graph returns of one slot; slots without one are unchanged by an edit.

    Attributes:
        slot: its name.
        dim: site axis of the rows that it returns, ``None`` if it returns the whole value.
    """

    slot: str
    dim: int | None


def with_updates(program: Program) -> tuple[fx.Graph, tuple[SlotUpdate, ...]]:
    """The lowered step graph with one more output per slot that an edit changes, and what these are, in order.

    An op says which of its arguments are recorded values and where their new rows are (``OpTraits.updates``). The kind
    of the slot says what is kept of these.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    outputs = graph.graph_copy(program.graph, mapping)
    loaded = {name: node for node in graph.nodes if (name := loaded_slot(node))}
    updates = slot_updates(program)
    stores = []
    for update, value in updates:
        rows_only, copied = update.dim is not None, mapping[value]
        slot = program.slots[update.slot]
        stores.append(slot.store_rows(graph, copied, loaded.__getitem__) if rows_only else copied)
    graph.output((*_flat(outputs), *stores))
    verify_functional(graph)
    graph.lint()
    return graph, tuple(update for update, _ in updates)


def slot_updates(program: Program) -> list[tuple[SlotUpdate, fx.Node]]:
    """What an edit changes of its slots, in their order, with the nodes of the lowered graph that it is made of."""
    updated: dict[str, tuple[SlotUpdate, fx.Node]] = {}
    for node in program.graph.nodes:
        for update, value in _updates_of(node, program.slots):
            updated.setdefault(update.slot, (update, value))
    return [updated[name] for name in program.slots if name in updated]


def _updates_of(node: fx.Node, slots: Mapping[str, Slot]) -> list[tuple[SlotUpdate, fx.Node]]:
    """Which slots a node of the lowered graph brings up to date, and the rows (or the whole value) it has for them."""
    if "updates" in node.meta:
        return [_dense_update(node)]
    found: list[tuple[SlotUpdate, fx.Node]] = []
    for update in traits_of(node.target).updates:
        slot = slots.get(loaded_slot(node.args[update.recorded]))
        if slot is None:
            continue
        new = node if update.new is None else node.args[update.new]
        assert isinstance(new, fx.Node)
        found.append((SlotUpdate(slot.name, None if update.new is None else slot.row_form().dim), new))
    return found


def _dense_update(node: fx.Node) -> tuple[SlotUpdate, fx.Node]:
    """The rows behind a value that was unpacked: those that are scattered, before the sites get two axes again."""
    scatter = node
    while scatter.target in (aten.reshape.default, aten.permute.default):
        scatter = scatter.args[0]  # type: ignore[assignment]
    assert scatter.target is fisedit.scatter_sites.default, ir.describe(node)
    rows, _, _, dim = scatter.args
    assert isinstance(rows, fx.Node) and isinstance(dim, int)
    return SlotUpdate(node.meta["updates"], dim), rows
