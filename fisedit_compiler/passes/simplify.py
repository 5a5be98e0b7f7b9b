"""Remove what computes nothing, without changing a bit of any result.

Before: ``div(dropout(to(x, float32), 0.0, False), 1.0)``
After:  ``x``

Also rewrites size arithmetic to a few nodes on the spatial input's own sizes, so that no size keeps a dense value
alive. Runs on the dense graph, before anything is rewritten; the recording graph is this graph.
"""

from __future__ import annotations

import torch
from torch import fx

from fisedit_compiler.capture.captured import CapturedGraph, is_size_node
from fisedit_compiler.capture.translate import ASSERTIONS
from fisedit_compiler.errors import LayoutError
from fisedit_compiler.graph.sizes import SizeBuilder
from fisedit_compiler.graph.specs import has_spec, spec_of

aten = torch.ops.aten


def simplify(captured: CapturedGraph) -> None:
    """Simplify a captured graph in place."""
    graph = captured.graph
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in ASSERTIONS:
            graph.erase_node(node)
        elif _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    _canonicalize_sizes(captured)
    graph.eliminate_dead_code()
    graph.lint()


def _is_identity(node: fx.Node) -> bool:
    if not node.args or not has_spec(node.args[0]) or not has_spec(node):
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if spec_of(source) != spec_of(node):
        return False
    if node.target is aten.dropout.default:
        rate, training = [*node.args, False][1:3]
        return bool(training is False or rate == 0.0)
    if node.target in (aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default):
        return True
    if node.target in (aten.to.dtype, aten.to.dtype_layout, aten.to.device):
        # Same dtype by spec; the device is the graph's only one. A copy flag would only matter to mutation.
        return True
    if node.target in (aten.div.Tensor, aten.mul.Tensor):
        factor = node.args[1]
        return isinstance(factor, (int, float)) and float(factor) == 1.0
    return False


def _canonicalize_sizes(captured: CapturedGraph) -> None:
    graph = captured.graph
    sizes = SizeBuilder(graph, captured.spatial, captured.multiple)
    for node in [node for node in graph.nodes if is_size_node(node)]:
        if node.op == "call_function" and node not in sizes._nodes.values():
            try:
                replacement = sizes(node.meta["expr"])
            except LayoutError:
                continue  # computed as the model does, from the value it asked
            if isinstance(replacement, int):
                _replace_by_number(node, replacement)
            else:
                node.replace_all_uses_with(replacement)


def _replace_by_number(node: fx.Node, number: int) -> None:
    def swap(argument: fx.Node) -> fx.Node | int:
        return number if argument is node else argument

    for user in list(node.users):
        user.args = fx.map_arg(user.args, swap)
        user.kwargs = fx.map_arg(user.kwargs, swap)
