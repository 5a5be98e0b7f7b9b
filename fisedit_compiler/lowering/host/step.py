"""The three things that happen to a step that a CPU interprets; each has a file and says before and after."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, fx

from fisedit_compiler.graph.ir import copy_graph
from fisedit_compiler.lowering.host.direct import call_directly
from fisedit_compiler.lowering.host.norms import fold_norms
from fisedit_compiler.lowering.host.prepared import Preparation, Recipe
from fisedit_compiler.lowering.host.products import is_worth_it, pack_products


def host_step(
    step: fx.Graph, attributes: Mapping[str, Any], hoisted: Mapping[str, Tensor], weights: Collection[str]
) -> tuple[fx.Graph, tuple[Recipe, ...]]:
    """A step, which stays as it is, as a CPU runs it.

    Args:
        step: a sparse graph after hoisting.
        attributes: the values of its ``get_attr`` nodes.
        hoisted: its hoisted values.
        weights: names of those that depend on weights alone.

    Returns:
        The graph, and how the values of its last placeholders are made, in order.
    """
    graph = copy_graph(step)
    preparation = Preparation(graph, attributes, hoisted, weights)
    if is_worth_it():
        pack_products(preparation)
    fold_norms(preparation)
    call_directly(graph)
    for node in list(graph.nodes):
        if node.op in ("placeholder", "get_attr") and not node.users:
            graph.erase_node(node)
    graph.lint()
    return graph, tuple(preparation.recipes)
