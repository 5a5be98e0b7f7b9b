"""A bound graph as one Python function that is given its weights, for calls that nothing compiles.

A graph module's own code looks every weight up in nested modules, under a path such as ``down_blocks.0.resnets.0``. A
step has hundreds of them, and each look-up takes some microseconds of a call whose operations take as long. On a CPU a
sparse step is changed besides (``lowering/host``), and given values that are made of its weights once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from operator import attrgetter
from threading import Lock
from typing import Any

import torch
from torch import Tensor, fx

from fisedit_compiler.compiling import one_at_a_time
from fisedit_compiler.graph.inputs import Input, Sources, graph_inputs, resolve
from fisedit_compiler.graph.ir import copy_graph
from fisedit_compiler.lowering.host.named import with_names
from fisedit_compiler.lowering.host.prepared import Recipe
from fisedit_compiler.lowering.host.step import host_step
from fisedit_compiler.runtime.execution.hoisting import HoistedGroup


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


@dataclass
class _Function:
    """A graph as a function of what its inputs stand for and, behind them, of values that are made of weights.

    Attributes:
        graph: the bound graph that it was made of.
        call: the function.
        inputs: of the graph, in order.
        recipes: of the values, in order.
        attributes: the weights that recipes read, by path.
        values: those that were made last, with the hoisted values of weights that they belong to.
        named: what is called instead while a profiler runs.
    """

    graph: fx.GraphModule
    call: Callable[..., Any]
    inputs: Sequence[Input]
    recipes: Sequence[Recipe] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    values: tuple[HoistedGroup | None, list[Any]] = (None, [])
    named: Callable[..., Any] | None = None


class InterpretedGraphs:
    """The graphs of one program that are interpreted, each made a function at its first call."""

    def __init__(self, graphs: Mapping[str, fx.GraphModule], lock: AbstractContextManager[Any]) -> None:
        """``graphs`` are those that are bound to the weights of the moment; ``lock`` is held to exchange them."""
        self._graphs, self._lock = graphs, lock
        self._preparing = Lock()
        self._functions: dict[str, _Function] = {}
        self._steps: dict[str, _Function] = {}
        self._prepared: tuple[HoistedGroup | None, dict[Recipe, Any]] = (None, {})

    def clear(self) -> None:
        """Forget everything: the bound graphs were exchanged."""
        self._functions.clear()
        self._steps.clear()
        self._prepared = (None, {})

    def run(self, name: str, bound: fx.GraphModule, sources: Sources) -> tuple[Sequence[Any], list[Any]]:
        """What a graph returns for a call, and the arguments that it was given."""
        function = self._functions.get(name) or self._made(name, bound)
        arguments = resolve(function.inputs, sources)
        return function.call(*arguments), arguments

    def run_on_host(self, name: str, bound: fx.GraphModule, sources: Sources, weights: HoistedGroup) -> Sequence[Any]:
        """What a sparse graph returns for a call on a CPU; ``weights`` are the hoisted values of weights alone."""
        step = self._steps.get(name) or self._made_step(name, bound, sources, weights)
        values = step.values
        if values[0] is not weights:
            values = self._prepare(step, weights, sources.hoisted)
        call = step.call if step.named is None or not torch.autograd._profiler_enabled() else step.named
        result: Sequence[Any] = call(*resolve(step.inputs, sources), *values[1])
        return result

    @one_at_a_time
    def _made(self, name: str, bound: fx.GraphModule) -> _Function:
        return self._keep(self._functions, name, _Function(bound, interpreted(bound), graph_inputs(bound.graph)))

    @one_at_a_time
    def _made_step(self, name: str, bound: fx.GraphModule, sources: Sources, weights: HoistedGroup) -> _Function:
        attributes = {path: attrgetter(path)(bound) for path in _looked_up(bound.graph)}
        graph, recipes = host_step(bound.graph, attributes, sources.hoisted, weights.values)
        module = fx.GraphModule({path: attributes[path] for path in _looked_up(graph)}, graph)
        inputs = graph_inputs(graph)
        known = inputs[: len(inputs) - len(recipes)]
        made = _Function(bound, interpreted(module), known, recipes, attributes, named=_named(module))
        return self._keep(self._steps, name, made)

    def _keep(self, kept: dict[str, _Function], name: str, made: _Function) -> _Function:
        with self._lock:
            if self._graphs.get(name) is made.graph:  # kept beside the graph that it was made of, or not at all
                kept[name] = made
        return made

    def _prepare(
        self, step: _Function, weights: HoistedGroup, hoisted: Mapping[str, Tensor]
    ) -> tuple[HoistedGroup, list[Any]]:
        with self._preparing:
            if self._prepared[0] is not weights:
                self._prepared = (weights, {})
                for other in list(self._steps.values()):
                    other.values = (None, [])  # as large as the weights, and maybe not called again
            known = self._prepared[1]
            for recipe in step.recipes:
                if recipe not in known:
                    known[recipe] = recipe.made(step.attributes, hoisted)
            step.values = made = (weights, [known[recipe] for recipe in step.recipes])
        return made


def _named(module: fx.GraphModule) -> Callable[..., Any]:
    """A step for profilers, which is made when one runs."""

    @cache
    def function() -> Callable[..., Any]:
        return interpreted(fx.GraphModule(module, with_names(module.graph)))

    return lambda *arguments: function()(*arguments)


def _looked_up(graph: fx.Graph) -> list[str]:
    return list(dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "get_attr"))
