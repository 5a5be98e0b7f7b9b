"""Cache stores: the recording graph is the dense graph that also returns every slot some sparse operation loads.

Before: ``return y``
After:  ``return y, canvas(x1), group_norm_statistics(x2), ...`` in the order of the program's slots

Also the stores of an edit run (:func:`with_updates`): the step graph that also returns the rows that the edit writes,
so that an edit is itself a recording. What they are written over is shared with the recording of the base run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from fisedit_compiler.graph import ir
from fisedit_compiler.graph.inputs import slot_of
from fisedit_compiler.graph.specs import spec_of
from fisedit_compiler.kernels.traits import traits_of
from fisedit_compiler.passes.base import Program, Slot

aten = torch.ops.aten
fisedit = torch.ops.fisedit


def recording_graph(program: Program) -> fx.Graph:
    """The dense graph with one more output per slot, flat: the model's own outputs first."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    outputs = graph.graph_copy(program.captured.graph, mapping)
    by_origin = {original.name: copied for original, copied in mapping.items()}
    stored: dict[str, fx.Node] = {}
    for slot in program.slots.values():
        stored[slot.name] = _store(graph, by_origin[slot.origin], slot, stored, program.slots, by_origin)
    graph.output((*_flat(outputs), *(stored[name] for name in program.slots)))
    graph.eliminate_dead_code()
    graph.lint()
    return graph


def _flat(outputs: Any) -> tuple[Any, ...]:
    return tuple(outputs) if isinstance(outputs, (list, tuple)) else (outputs,)


def _store(
    graph: fx.Graph,
    value: fx.Node,
    slot: Slot,
    stored: dict[str, fx.Node],
    slots: Mapping[str, Slot],
    by_origin: Mapping[str, fx.Node],
) -> fx.Node:
    if slot.name in stored:
        return stored[slot.name]
    if slot.kind == "dense":
        return value
    if slot.kind == "statistics":
        return ir.call(graph, fisedit.group_norm_statistics.default, (value, slot.groups))
    if slot.kind == "site_sums":
        centre = slots[slot.of]
        stored[slot.of] = _store(graph, by_origin[centre.origin], centre, stored, slots, by_origin)
        return ir.call(graph, fisedit.group_norm_site_sums.default, (value, stored[slot.of], slot.groups))
    order = slot.layout.packed
    if order.sides == 1:
        return value
    # [B, C, H, W] -> [B, H, W, C] -> [B, S, C], always a copy: the value may be the caller's own tensor.
    moved = ir.call(graph, aten.permute.default, (value, list(order.permutation)))
    copied = ir.call(graph, aten.clone.default, (moved,))
    copied.kwargs = {"memory_format": torch.contiguous_format}
    return ir.call(graph, aten.flatten.using_ints, (copied, order.site_dim, order.site_dim + 1))


@dataclass(frozen=True)
class SlotUpdate:
    """What the update graph returns of one slot; slots without one are unchanged by an edit.

    Attributes:
        slot: its name.
        kind: ``rows`` of the active sites, the ``whole`` value, or the rows of site ``sums`` about the statistics
            that the edit read.
        dim: site axis of the rows.
        channels: of the GroupNorm behind site sums.
    """

    slot: str
    kind: Literal["rows", "whole", "sums"]
    dim: int = 0
    channels: int = 0


def with_updates(program: Program) -> tuple[fx.Graph, tuple[SlotUpdate, ...]]:
    """The lowered step graph with one more output per slot that an edit changes, and what these are, in order.

    Of ``canvas`` and ``dense`` slots it returns the active rows. With ``norm="incremental"`` it returns the corrected
    ``statistics``, and the active sites' ``site_sums``; otherwise both stay as they are.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    outputs = graph.graph_copy(program.graph, mapping)
    updated: dict[str, tuple[SlotUpdate, fx.Node]] = {}
    for node in list(graph.nodes):
        for update, value in _updates_of(node, program.slots):
            if update.slot not in updated:
                updated[update.slot] = (update, value)
    ordered = [updated[name] for name in program.slots if name in updated]
    stores = [
        _fresh_sums(graph, value, program.slots[update.slot].groups) if update.kind == "sums" else value
        for update, value in ordered
    ]
    graph.output((*_flat(outputs), *stores))
    graph.lint()
    return graph, tuple(update for update, _ in ordered)


def _updates_of(node: fx.Node, slots: Mapping[str, Slot]) -> list[tuple[SlotUpdate, fx.Node]]:
    """Which slots a node of the lowered graph brings up to date, and from which node their update is made."""
    if "updates" in node.meta:
        return [_dense_update(node)]
    found: list[tuple[SlotUpdate, fx.Node]] = []
    for update in traits_of(node.target).updates:
        name = slot_of(node.args[update.recorded])
        new = node if update.new is None else node.args[update.new]
        assert isinstance(new, fx.Node)
        if name not in slots:
            continue
        if update.kind == "rows":
            found.append((SlotUpdate(name, "rows", slots[name].layout.site_dim()), new))
        elif update.kind == "whole":
            found.append((SlotUpdate(name, "whole"), new))
        else:
            found.append((SlotUpdate(name, "sums", 1, int(spec_of(new).shape[2])), node))
    return found


def _dense_update(node: fx.Node) -> tuple[SlotUpdate, fx.Node]:
    """The rows behind a value that was unpacked: those that are scattered, before the sites get two axes again."""
    scatter = node
    while scatter.target in (aten.reshape.default, aten.permute.default):
        scatter = scatter.args[0]  # type: ignore[assignment]
    assert scatter.target is fisedit.scatter_sites.default, ir.describe(node)
    rows, _, _, dim = scatter.args
    assert isinstance(rows, fx.Node) and isinstance(dim, int)
    return SlotUpdate(node.meta["updates"], "rows", dim), rows


def _fresh_sums(graph: fx.Graph, node: fx.Node, groups: int) -> fx.Node:
    """Site sums of the active rows that ``update_statistics`` read, about the mean that it corrects."""
    rows, statistics, *_ = node.args
    channels_first = ir.call(graph, aten.permute.default, (rows, [0, 2, 1]))
    return ir.call(graph, fisedit.group_norm_site_sums.default, (channels_first, statistics, groups))
