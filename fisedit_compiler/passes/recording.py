"""Cache stores: the recording graph is the dense graph that also returns every slot some sparse operation loads.

Before: ``return y``
After:  ``return y, canvas(x1), group_norm_statistics(x2), ...`` in the order of the program's slots

Also the stores of an edit run (:func:`with_updates`): the step graph that also returns what each slot becomes, so
that an edit is itself a recording.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fisedit_compiler import ir
from fisedit_compiler.layout import SITES
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
    if slot.layout.kind == "tokens":
        return value
    # [B, C, H, W] -> [B, H, W, C] -> [B, S, C], always a copy: the value may be the caller's own tensor.
    axes = [axis for axis in slot.layout.packed_axes() if axis != SITES]
    site = slot.layout.site_dim()
    order = [*axes[:site], *slot.layout.axes, *axes[site:]]
    moved = ir.call(graph, aten.permute.default, (value, order))
    copied = ir.call(graph, aten.clone.default, (moved,))
    copied.kwargs = {"memory_format": torch.contiguous_format}
    return ir.call(graph, aten.flatten.using_ints, (copied, site, site + 1))


def with_updates(program: Program) -> fx.Graph:
    """The lowered step graph with one more output per slot: its value after the edit.

    ``canvas`` slots get their active rows written; ``statistics`` and ``site_sums`` follow the corrected statistics
    (``norm="incremental"``) or stay as they are; ``dense`` slots are the values unpacked on the way.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    outputs = graph.graph_copy(program.graph, mapping)
    inputs = {node.meta["input"]: node for node in graph.nodes if "input" in node.meta}
    updated: dict[str, fx.Node] = {}

    def active(slot: Slot) -> fx.Node:
        identity = ("table", "active", slot.layout.level)
        if identity not in inputs:
            last = [node for node in graph.nodes if node.op == "placeholder"][-1]
            with graph.inserting_after(last):
                assert slot.layout.level is not None
                inputs[identity] = graph.placeholder(f"active_{ir.level_name(slot.layout.level)}")
            inputs[identity].meta["input"] = identity
        return inputs[identity]

    for node in list(graph.nodes):
        for slot_name, update in _updates_of(node, program.slots):
            if slot_name in updated:
                continue
            slot, kind, rows = program.slots[slot_name], *update
            if kind == "value":
                updated[slot_name] = rows
            elif kind == "rows":
                canvas = inputs["slot", slot_name]
                args = (rows, canvas, active(slot), slot.layout.site_dim())
                updated[slot_name] = ir.call(graph, fisedit.scatter_sites.default, args)
            else:
                updated[slot_name] = _updated_sums(graph, node, slot, active(slot))
    stores = [updated.get(name, inputs["slot", name]) for name in program.slots]
    graph.output((*_flat(outputs), *stores))
    graph.lint()
    return graph


Update = tuple[str, tuple[str, Any]]


def _updates_of(node: fx.Node, slots: Mapping[str, Slot]) -> list[Update]:
    """Which slots a node of the lowered graph brings up to date, and with what."""
    if "updates" in node.meta:
        return [(node.meta["updates"], ("value", node))]
    positions: dict[Any, list[tuple[int, int]]] = {
        fisedit.conv2d_sites.default: [(1, 0)],
        fisedit.attention_sites.default: [(3, 1), (4, 2)],
    }
    found: list[Update] = []
    for canvas, rows in positions.get(node.target, []):
        name = _slot_name(node.args[canvas])
        if name in slots:
            found.append((name, ("rows", node.args[rows])))
    if node.target is fisedit.update_statistics.default:
        found.append((_slot_name(node.args[1]), ("value", node)))
        found.append((_slot_name(node.args[2]), ("sums", node)))
    return found


def _slot_name(argument: Any) -> str:
    kind, name, *_ = argument.meta.get("input", ("", ""))
    return str(name) if kind == "slot" else ""


def _updated_sums(graph: fx.Graph, node: fx.Node, slot: Slot, active: fx.Node) -> fx.Node:
    """Site sums after an edit: active rows measured again, everything re-centred on the corrected mean."""
    rows, statistics, sums, _ = node.args
    channels_first = ir.call(graph, aten.permute.default, (rows, [0, 2, 1]))
    fresh = ir.call(graph, fisedit.group_norm_site_sums.default, (channels_first, statistics, slot.groups))
    written = ir.call(graph, fisedit.scatter_sites.default, (fresh, sums, active, 1))
    channels = ir.call(graph, aten.sym_size.int, (rows, 2))
    return ir.call(graph, fisedit.recentre_site_sums.default, (written, statistics, node, channels))
