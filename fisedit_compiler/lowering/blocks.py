"""Blocks of a lowered graph: what a module of the user's model computes, from its first product to its last."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx

from fisedit_compiler.graph import ir
from fisedit_compiler.graph.inputs import input_of
from fisedit_compiler.graph.specs import has_spec, spec_of
from fisedit_compiler.lowering.open_products import is_product


@dataclass(frozen=True, eq=False)
class Block:
    """Consecutive calls of a graph.

    Attributes:
        path: the module in the user's model.
        start: the first call's position among the graph's calls.
        nodes: the calls, without those that compute sizes.
    """

    path: str
    start: int
    nodes: tuple[fx.Node, ...]
    _inside: frozenset[fx.Node] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_inside", frozenset(self.nodes))

    def __contains__(self, node: fx.Node) -> bool:
        return node in self._inside

    @cached_property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The values from outside that it reads, in order of their first use; no sizes."""
        read = (value for node in self.nodes for value in node.all_input_nodes)
        return tuple(dict.fromkeys(value for value in read if value not in self and not _is_size(value)))

    @cached_property
    def sizes(self) -> dict[fx.Node, tuple[int, int] | None]:
        """The sizes that it reads, each with an input and an axis that is as long; ``None``: no input is."""
        read = (value for node in self.nodes for value in node.all_input_nodes if _is_size(value))
        axes = [(number, spec_of(value)) for number, value in enumerate(self.inputs) if has_spec(value)]
        known = {size: (number, axis) for number, spec in axes for axis, size in enumerate(spec.shape)}
        return {size: known.get(size.meta["expr"]) for size in read}

    @cached_property
    def _read_outside(self) -> frozenset[fx.Node]:
        """What calls outside read, and what the views among that are views of."""
        found = {node for node in self.nodes if any(user not in self for user in node.users)}
        for node in reversed(self.nodes):
            if node in found and _is_view(node):
                found.update(value for value in node.all_input_nodes if value in self)
        return frozenset(found)

    @property
    def results(self) -> tuple[fx.Node, ...]:
        """The values that others need of it, in order; none is a view."""
        return tuple(node for node in self.nodes if node in self._read_outside and not _is_view(node))

    @property
    def views(self) -> tuple[fx.Node, ...]:
        """The views that others read, in order: of its inputs, its results and of each other."""
        return tuple(node for node in self.nodes if node in self._read_outside and _is_view(node))

    @cached_property
    def form(self) -> tuple[Any, ...] | None:
        """What equal blocks have in common; ``None`` if the block cannot be a graph of its own."""
        if not self.results or not all(map(has_spec, self.results)) or None in self.sizes.values():
            return None
        words = {value: f"%{number}" for number, value in enumerate((*self.inputs, *self.nodes))}
        words |= {size: f"%size{axis}" for size, axis in self.sizes.items()}
        calls = [(node.target, repr(fx.map_arg((node.args, node.kwargs), words.__getitem__))) for node in self.nodes]
        return (*map(_described, self.inputs), *calls, *(words[value] for value in self.results))


def blocks_of(graph: fx.Graph, smallest: int) -> list[Block]:
    """Every block of a graph with at least so many calls, also those inside others."""
    calls = [node for node in graph.nodes if node.op == "call_function"]
    spans: dict[str, tuple[int, int]] = {}
    for position, node in enumerate(calls):
        if is_product(node):
            for path in _paths(node):
                spans[path] = (spans.get(path, (position, position))[0], position)
    # The innermost of the modules that compute the same.
    innermost = {span: path for path, span in sorted(spans.items(), key=lambda item: len(item[0]))}
    blocks = (_block(path, first, calls[first : last + 1]) for (first, last), path in innermost.items())
    return [block for block in blocks if block is not None and len(block.nodes) >= smallest]


def _block(path: str, start: int, calls: Sequence[fx.Node]) -> Block | None:
    """The block of a module, unless other modules' calls are between its own."""
    block = Block(path, start, tuple(node for node in calls if not _is_size(node)))
    own = all(path in _paths(node) for node in block.nodes)
    sizes = all(value not in block for node in calls if _is_size(node) for value in node.all_input_nodes)
    return block if own and sizes else None


def _paths(node: fx.Node) -> Iterator[str]:
    """The modules that a node is computed in, the outermost first."""
    names = ir.path_of(node).split(".")
    return (".".join(names[: count + 1]) for count in range(len(names)) if names[0])


def _is_size(node: fx.Node) -> bool:
    return "expr" in node.meta


def _is_view(node: fx.Node) -> bool:
    """Whether a call's result shares the memory of its argument, or may."""
    if node.target is operator.getitem:
        whole = node.args[0]
        return isinstance(whole, fx.Node) and whole.op == "call_function" and _is_view(whole)
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return any(result.alias_info is not None for result in node.target._schema.returns)


def _described(value: fx.Node) -> tuple[Any, ...]:
    """What an input is, apart from which of its kind."""
    if has_spec(value):
        spec = spec_of(value)
        return (spec.shape, spec.dtype)
    item = input_of(value)
    return (value.target,) if item is None else (type(item), getattr(item, "key", None))
