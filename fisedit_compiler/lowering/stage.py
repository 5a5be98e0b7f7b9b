"""Make a step ready for CUDA graphs: bring of the recording only what a call reads, find the rest by address.

Before: ``conv2d_sites(rows, slot_x [B,S,C], ring, taps, ...)``
After:  ``conv2d_sites(rows, ring_of_x [B,R,C], iota [R], taps, ...)``
Before: ``attention_sites(q, k, v, slot_key, slot_value, active, scale, inverse)``
After:  ``attention_addressed(q, k, v, slot_key, slot_value, active, inverse, addresses, i, j, scale)``
Before: ``update_statistics(rows, statistics, slot_sums, active)``, and where an edit is recorded, behind everything
        else, ``group_norm_row_sums(rows, statistics)``
After:  both results of ``update_statistics_addressed(rows, statistics, slot_sums, active, addresses, i, recorded)``

A CUDA graph needs its inputs at fixed addresses. Of a recorded canvas a convolution reads only the ring, so only the
ring is brought there; keys, values and site sums are read where they are. A norm's rows are read once for its
statistics and for what an edit keeps of them, so that an edit that is recorded launches nothing more for it. The new
placeholders stand for ring rows, for their numbers and for the table of addresses; those that are only looked up by
address say so (``graph/inputs.py``).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

from fisedit_compiler.graph.inputs import (
    AddressedInput,
    AddressInput,
    Input,
    IotaInput,
    RingRowsInput,
    key_of,
    placeholder,
    slot_of,
)
from fisedit_compiler.graph.ir import call, copy_graph, nodes_calling

CONVOLUTION = torch.ops.fisedit.conv2d_sites.default
ATTENTION = torch.ops.fisedit.attention_sites.default
ADDRESSED = torch.ops.fisedit.attention_addressed.default
UPDATE = torch.ops.fisedit.update_statistics.default
ROW_SUMS = torch.ops.fisedit.group_norm_row_sums.default
UPDATE_ADDRESSED = torch.ops.fisedit.update_statistics_addressed.default


def stage(step: fx.Graph, slots: Sequence[str]) -> fx.Graph:
    """A copy of a hoisted step graph, staged.

    Args:
        step: the step graph; it stays as it is.
        slots: all slot names; a slot's place here is its entry in the table of addresses.
    """
    graph = copy_graph(step)
    made: dict[Input, fx.Node] = {}
    kept = {node.args: node for node in nodes_calling(graph, [ROW_SUMS])}
    for node in list(graph.nodes):
        if node.target is CONVOLUTION:
            _stage_ring(node, made)
        elif node.target is ATTENTION:
            _stage_canvases(node, made, slots)
        elif node.target is UPDATE:
            _stage_sums(node, kept.pop(node.args[:2], None), made, slots)
    for node in reversed(list(graph.nodes)):
        if node.op == "placeholder" and not node.users:
            graph.erase_node(node)
    graph.lint()
    return graph


def _stage_ring(node: fx.Node, made: dict[Input, fx.Node]) -> None:
    canvas, ring = node.args[1], node.args[2]
    assert isinstance(canvas, fx.Node) and isinstance(ring, fx.Node)
    if canvas.op != "placeholder" or ring.op != "placeholder":
        return
    key = key_of(ring)
    staged = _beside(canvas, made, RingRowsInput(slot_of(canvas), key), f"ring_of_{canvas.name}")
    iota = _beside(ring, made, IotaInput(key), f"iota_{ring.name}")
    node.args = (node.args[0], staged, iota, *node.args[3:])


def _stage_canvases(node: fx.Node, made: dict[Input, fx.Node], slots: Sequence[str]) -> None:
    query, key, value, key_canvas, value_canvas, active, scale, inverse = (*node.args, None, None)[:8]
    if not all(isinstance(canvas, fx.Node) and canvas.op == "placeholder" for canvas in (key_canvas, value_canvas)):
        return
    assert isinstance(key_canvas, fx.Node) and isinstance(value_canvas, fx.Node)
    names = [slot_of(canvas) for canvas in (key_canvas, value_canvas)]
    canvases = [
        _beside(canvas, made, AddressedInput(name), f"at_{canvas.name}")
        for name, canvas in zip(names, (key_canvas, value_canvas), strict=True)
    ]
    addresses = _beside(key_canvas, made, AddressInput(), "addresses")
    entries = [list(slots).index(name) for name in names]
    node.target = ADDRESSED
    node.args = (query, key, value, *canvases, active, inverse, addresses, *entries, scale)
    node.kwargs = {}


def _stage_sums(node: fx.Node, kept: fx.Node | None, made: dict[Input, fx.Node], slots: Sequence[str]) -> None:
    """``kept`` are the sums of the same rows about the same mean, if an edit keeps them."""
    rows, statistics, site_sums, active = node.args
    assert isinstance(site_sums, fx.Node)
    if site_sums.op != "placeholder":
        return
    name = slot_of(site_sums)
    addressed = _beside(site_sums, made, AddressedInput(name), f"at_{site_sums.name}")
    addresses = _beside(site_sums, made, AddressInput(), "addresses")
    args = (rows, statistics, addressed, active, addresses, list(slots).index(name), kept is not None)
    graph = node.graph
    with graph.inserting_before(node):
        both = call(graph, UPDATE_ADDRESSED, args, source=node)
        results = [call(graph, operator.getitem, (both, position)) for position in range(1 if kept is None else 2)]
    for old, new in zip([node, kept], results, strict=False):
        assert old is not None
        new.meta = {**node.meta, **old.meta}
        old.replace_all_uses_with(new)
        graph.erase_node(old)


def _beside(node: fx.Node, made: dict[Input, fx.Node], item: Input, name: str) -> fx.Node:
    """The placeholder of an input; made right behind another one, unless it is there already."""
    if item not in made:
        with node.graph.inserting_after(node):
            made[item] = placeholder(node.graph, name, item)
    return made[item]
