"""Values that a step on a CPU is given besides its inputs: made of its weights once, in the form that its calls read.

A pass asks for one with :meth:`Preparation.placeholder`; whoever runs the graph makes them by their recipes. Graphs of
one program that ask for the same share it, since equal recipes are one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from fisedit_compiler.graph.inputs import HoistedInput, input_of
from fisedit_compiler.graph.ir import unused_name


@dataclass(frozen=True)
class Weight:
    """Where a weight comes from: it is one of the module's, or a hoisted value that depends on these alone."""

    name: str
    hoisted: bool

    def of(self, attributes: Mapping[str, Any], hoisted: Mapping[str, Tensor]) -> Any:
        """Its value."""
        return hoisted[self.name] if self.hoisted else attributes[self.name]


@dataclass(frozen=True)
class Recipe:
    """How a prepared value is made: ``make(*weights, *constants)``."""

    make: Callable[..., Any]
    weights: tuple[Weight | None, ...]
    constants: tuple[Any, ...] = ()

    def made(self, attributes: Mapping[str, Any], hoisted: Mapping[str, Tensor]) -> Any:
        """The value."""
        return self.make(*(weight and weight.of(attributes, hoisted) for weight in self.weights), *self.constants)


class Preparation:
    """What one graph wants prepared.

    Attributes:
        recipes: of its last placeholders, in order.
    """

    def __init__(
        self, graph: fx.Graph, attributes: Mapping[str, Any], hoisted: Mapping[str, Tensor], weights: Collection[str]
    ) -> None:
        """``weights`` are the names of the hoisted values that depend on weights alone."""
        self.graph, self._attributes, self._hoisted, self._weights = graph, attributes, hoisted, weights
        self.recipes: dict[Recipe, fx.Node] = {}
        self._last = [node for node in graph.nodes if node.op == "placeholder"][-1]

    def weight(self, node: Any) -> Weight | None:
        """The weight that a node is; ``None`` if it is none."""
        if not isinstance(node, fx.Node):
            return None
        if node.op == "get_attr":
            return Weight(str(node.target), hoisted=False)
        item = input_of(node)
        return Weight(item.value, True) if isinstance(item, HoistedInput) and item.value in self._weights else None

    def value(self, weight: Weight) -> Any:
        """The value that a weight has as the graph is prepared; its form stays, its contents may change."""
        return weight.of(self._attributes, self._hoisted)

    def placeholder(self, recipe: Recipe, name: str) -> fx.Node:
        """The placeholder of a prepared value; ``name`` is what a new one is called."""
        if recipe not in self.recipes:
            with self.graph.inserting_after(self._last):
                self.recipes[recipe] = self._last = self.graph.placeholder(unused_name(self.graph, name))
        return self.recipes[recipe]
