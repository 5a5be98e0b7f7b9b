"""Let convolutions read staged ring rows instead of whole recorded canvases.

Before: ``conv2d_sites(rows, slot_x [B,S,C], ring, taps, ...)``
After:  ``conv2d_sites(rows, ring_of_x [B,R,C], iota [R], taps, ...)``

A CUDA graph needs its inputs at fixed addresses; of a recorded canvas a sparse call reads only the ring, so only the
ring is brought there. The new placeholders carry ``meta["input"] = ("ring_rows", slot, key)`` and ``("iota", key)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fisedit_compiler.passes import copy_graph

CONVOLUTION = torch.ops.fisedit.conv2d_sites.default


def stage_rings(step: fx.Graph) -> fx.Graph:
    """A copy of a hoisted step graph whose canvases, where only convolutions read them, are staged rings."""
    graph = copy_graph(step)
    made: dict[tuple[Any, ...], fx.Node] = {}
    for node in list(graph.nodes):
        if node.target is not CONVOLUTION:
            continue
        canvas, ring = node.args[1], node.args[2]
        assert isinstance(canvas, fx.Node) and isinstance(ring, fx.Node)
        if canvas.op != "placeholder" or ring.op != "placeholder":
            continue
        slot, key = canvas.meta["input"][1], ring.meta["input"][2]
        staged = _placeholder(graph, made, ("ring_rows", slot, key), f"ring_of_{canvas.name}", canvas)
        iota = _placeholder(graph, made, ("iota", key), f"iota_{ring.name}", ring)
        node.args = (node.args[0], staged, iota, *node.args[3:])
    for node in reversed(list(graph.nodes)):
        if node.op == "placeholder" and not node.users:
            graph.erase_node(node)
    graph.lint()
    return graph


def _placeholder(
    graph: fx.Graph, made: dict[tuple[Any, ...], fx.Node], identity: tuple[Any, ...], name: str, beside: fx.Node
) -> fx.Node:
    if identity not in made:
        with graph.inserting_after(beside):
            made[identity] = graph.placeholder(name)
        made[identity].meta["input"] = identity
    return made[identity]
