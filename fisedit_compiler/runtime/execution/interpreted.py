"""A bound graph as one Python function that is given its weights, for calls that nothing compiles.

A graph module's own code looks every weight up in nested modules, under a path such as ``down_blocks.0.resnets.0``. A
step has hundreds of them, and each look-up takes some microseconds of a call whose operations take as long.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

from torch import fx

from fisedit_compiler.graph.ir import copy_graph


def interpreted(bound: fx.GraphModule) -> Callable[..., Any]:
    """A function of the graph's placeholders that returns what ``bound`` does, bit for bit.

    Before::

        def forward(self, x):
            weight = self.conv.weight
            return linear(x, weight)

    After, called with ``bound.conv.weight`` as its last argument::

        def forward(self, x, weight):
            return linear(x, weight)
    """
    graph = copy_graph(bound.graph)
    taken = {str(node.target) for node in graph.nodes if node.op == "placeholder"}
    first = next(node for node in graph.nodes if node.op != "placeholder")
    looked_up = [node for node in graph.nodes if node.op == "get_attr"]
    arguments: dict[str, fx.Node] = {}
    with graph.inserting_before(first):
        for node in looked_up:
            if node.target not in arguments:
                arguments[str(node.target)] = graph.placeholder(_unused(node.name, taken))
    for node in looked_up:
        node.replace_all_uses_with(arguments[str(node.target)])
        graph.erase_node(node)
    weights = [attrgetter(path)(bound) for path in arguments]
    function = fx.GraphModule({}, graph).forward

    def run(*inputs: Any) -> Any:
        return function(*inputs, *weights)

    return run


def _unused(name: str, taken: set[str]) -> str:
    """``name``, or it made longer: placeholders of equal names would be one argument twice."""
    while name in taken:
        name += "_"
    taken.add(name)
    return name
