"""Make a step ready for CUDA graphs: bring of the recording only what a call reads, find the rest by address.

Before: ``conv2d_sites(rows, slot_x [B,S,C], ring, taps, ...)``
After:  ``conv2d_sites(rows, ring_of_x [B,R,C], iota [R], taps, ...)``
Before: ``attention_sites(q, k, v, slot_key, slot_value, active, scale, inverse)``
After:  ``attention_addressed(q, k, v, slot_key, slot_value, active, inverse, addresses, i, j, scale)``

A CUDA graph needs its inputs at fixed addresses. Of a recorded canvas a convolution reads only the ring, so only the
ring is brought there; keys and values are read where they are. The new placeholders carry ``meta["input"] =
("ring_rows", slot, key)``, ``("iota", key)`` and ``("addresses",)``; those that are only looked up by address
``("addressed", slot)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fisedit_compiler.graph.ir import copy_graph

CONVOLUTION = torch.ops.fisedit.conv2d_sites.default
ATTENTION = torch.ops.fisedit.attention_sites.default
ADDRESSED = torch.ops.fisedit.attention_addressed.default


def stage(step: fx.Graph, slots: Sequence[str]) -> fx.Graph:
    """A copy of a hoisted step graph, staged.

    Args:
        step: the step graph; its placeholders carry ``meta["input"]``.
        slots: all slot names; a slot's place here is its entry in the table of addresses.
    """
    graph = copy_graph(step)
    made: dict[tuple[Any, ...], fx.Node] = {}
    for node in list(graph.nodes):
        if node.target is CONVOLUTION:
            _stage_ring(node, graph, made)
        elif node.target is ATTENTION:
            _stage_canvases(node, graph, made, slots)
    for node in reversed(list(graph.nodes)):
        if node.op == "placeholder" and not node.users:
            graph.erase_node(node)
    graph.lint()
    return graph


def _stage_ring(node: fx.Node, graph: fx.Graph, made: dict[tuple[Any, ...], fx.Node]) -> None:
    canvas, ring = node.args[1], node.args[2]
    assert isinstance(canvas, fx.Node) and isinstance(ring, fx.Node)
    if canvas.op != "placeholder" or ring.op != "placeholder":
        return
    slot, key = canvas.meta["input"][1], ring.meta["input"][2]
    staged = _placeholder(graph, made, ("ring_rows", slot, key), f"ring_of_{canvas.name}", canvas)
    iota = _placeholder(graph, made, ("iota", key), f"iota_{ring.name}", ring)
    node.args = (node.args[0], staged, iota, *node.args[3:])


def _stage_canvases(node: fx.Node, graph: fx.Graph, made: dict[tuple[Any, ...], fx.Node], slots: Sequence[str]) -> None:
    query, key, value, key_canvas, value_canvas, active, scale, inverse = (*node.args, None, None)[:8]
    if not all(isinstance(canvas, fx.Node) and canvas.op == "placeholder" for canvas in (key_canvas, value_canvas)):
        return
    assert isinstance(key_canvas, fx.Node) and isinstance(value_canvas, fx.Node)
    names = [canvas.meta["input"][1] for canvas in (key_canvas, value_canvas)]
    canvases = [
        _placeholder(graph, made, ("addressed", name), f"at_{canvas.name}", canvas)
        for name, canvas in zip(names, (key_canvas, value_canvas), strict=True)
    ]
    addresses = _placeholder(graph, made, ("addresses",), "addresses", key_canvas)
    entries = [list(slots).index(name) for name in names]
    node.target = ADDRESSED
    node.args = (query, key, value, *canvases, active, inverse, addresses, *entries, scale)
    node.kwargs = {}


def _placeholder(
    graph: fx.Graph, made: dict[tuple[Any, ...], fx.Node], identity: tuple[Any, ...], name: str, beside: fx.Node
) -> fx.Node:
    if identity not in made:
        with graph.inserting_after(beside):
            made[identity] = graph.placeholder(name)
        made[identity].meta["input"] = identity
    return made[identity]
