"""Binding times: move values that depend on neither a spatial input nor the recording out of the step.

Before (step): ``sdpa(rows(q), linear(text, to_k), linear(text, to_v))``
After (step):  ``sdpa(rows(q), hoisted_k, hoisted_v)``
       bundle ``encoder_hidden_states``: ``hoisted_k = linear(text, to_k); hoisted_v = ...``

Values are bundled by the exact set of inputs they depend on: weights only, text only, timestep only, timestep and
text together. A bundle is computed again when one of its inputs changes, and never otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from fisedit_compiler.graph.inputs import (
    BatchInput,
    CallInput,
    HoistedInput,
    Input,
    SlotInput,
    graph_inputs,
    input_of,
    placeholder,
)

BATCH_SIZE = "batch"
"""Name of the pseudo-input that stands for the size of the batch."""
Dependences = Mapping[fx.Node, frozenset[str]]
"""What each value of a graph depends on."""
_UNHOISTABLE = frozenset({"#spatial", "#recording", "#plan"})


@dataclass(frozen=True)
class Bundle:
    """A graph of hoisted values with equal dependences.

    Attributes:
        name: the inputs it depends on, joined by ``+``; ``weights`` when there are none.
        dependences: names of call inputs (and :data:`BATCH_SIZE`) it depends on.
        graph: computes the values; its placeholders stand for tensors of the call, the batch and other bundles' values.
        values: names of the values it returns, in order.
    """

    name: str
    dependences: frozenset[str]
    graph: fx.Graph
    values: tuple[str, ...]

    @cached_property
    def ordered(self) -> tuple[str, ...]:
        """The dependences in a fixed order."""
        return tuple(sorted(self.dependences))

    @cached_property
    def inputs(self) -> tuple[Input, ...]:
        """What the graph's placeholders stand for, in order."""
        return graph_inputs(self.graph)


def hoist(graph: fx.Graph, spatial: Iterable[str]) -> tuple[fx.Graph, list[Bundle]]:
    """Split a lowered graph into a step graph and bundles, in an order in which bundles can be computed.

    ``spatial`` are the names of the spatial placeholders. Every placeholder of the results says what it stands for
    (``graph/inputs.py``).
    """
    dependences = _dependences(graph, frozenset(spatial))
    groups: dict[frozenset[str], list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and not _is_size(node) and not dependences[node] & _UNHOISTABLE:
            groups.setdefault(dependences[node], []).append(node)
    home = {node: key for key, nodes in groups.items() for node in nodes}
    bundles = [
        _bundle(key, groups[key], home, dependences) for key in sorted(groups, key=lambda key: (len(key), sorted(key)))
    ]
    step = _step(graph, home)
    return step, [bundle for bundle in bundles if bundle.values]


def _dependences(graph: fx.Graph, spatial: frozenset[str]) -> dict[fx.Node, frozenset[str]]:
    result: dict[fx.Node, frozenset[str]] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            if _is_of_call(node):
                result[node] = frozenset({"#spatial" if node.name in spatial else node.name})
            else:
                result[node] = frozenset({"#recording" if isinstance(input_of(node), SlotInput) else "#plan"})
        elif node.op == "get_attr":
            result[node] = frozenset()
        elif node.target is torch.ops.aten.sym_size.int:
            result[node] = frozenset({_size_dependence(node, spatial)})
        else:
            result[node] = frozenset().union(*(result[argument] for argument in node.all_input_nodes))
    return result


def _size_dependence(node: fx.Node, spatial: frozenset[str]) -> str:
    source: Any = node.args[0]
    if _is_batch(node, spatial):
        return BATCH_SIZE
    return source.name if _is_of_call(source) and source.name not in spatial else "#plan"


def _is_of_call(node: fx.Node) -> bool:
    """Whether a node is a tensor of the call; before hoisting these say nothing of themselves."""
    return node.op == "placeholder" and isinstance(input_of(node), CallInput | None)


def _is_batch(node: fx.Node, spatial: frozenset[str]) -> bool:
    source, dim = node.args[:2]
    return isinstance(source, fx.Node) and source.name in spatial and dim is not None and int(dim) == 0  # type: ignore[arg-type]


def _is_size(node: fx.Node) -> bool:
    return "expr" in node.meta


def _bundle(
    key: frozenset[str], nodes: list[fx.Node], home: dict[fx.Node, frozenset[str]], dependences: Dependences
) -> Bundle:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        graph_node = graph.node_copy(node, lambda a: _bundle_input(a, graph, copies, home, key, dependences))
        copies[node] = graph_node
    exported = [node for node in nodes if any(home.get(user) != key for user in node.users)]
    graph.output(tuple(copies[node] for node in exported))
    _placeholders_first(graph)
    graph.lint()
    name = "+".join(sorted(key)) if key else "weights"
    return Bundle(name, key, graph, tuple(node.name for node in exported))


def _bundle_input(
    node: fx.Node,
    graph: fx.Graph,
    copies: dict[fx.Node, fx.Node],
    home: dict[fx.Node, frozenset[str]],
    key: frozenset[str],
    dependences: Dependences,
) -> fx.Node:
    """The copy of ``node`` inside a bundle: computed there, or an input of it."""
    if node in copies:
        return copies[node]
    if node.op == "get_attr":
        copies[node] = graph.node_copy(node)
    elif node.op == "placeholder":
        copies[node] = placeholder(graph, node.name, CallInput(node.name))
    elif node in home:
        assert home[node] != key, node
        copies[node] = placeholder(graph, node.name, HoistedInput(node.name))
    elif node.target is torch.ops.aten.sym_size.int and dependences[node] == {BATCH_SIZE}:
        copies[node] = placeholder(graph, BATCH_SIZE, BatchInput())
    else:  # size arithmetic: cheap, computed again
        copies[node] = graph.node_copy(node, lambda a: _bundle_input(a, graph, copies, home, key, dependences))
    return copies[node]


def _placeholders_first(graph: fx.Graph) -> None:
    first = next(iter(graph.nodes))
    for node in list(graph.nodes):
        if node.op == "placeholder" and node is not first:
            first.prepend(node)


def _step(graph: fx.Graph, home: dict[fx.Node, frozenset[str]]) -> fx.Graph:
    step = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    needed = [node for node in home if any(user not in home for user in node.users)]
    for node in graph.nodes:
        if node in home:
            continue
        copies[node] = step.node_copy(node, lambda argument: copies[argument])
        if node.op == "placeholder":
            copies[node].meta.setdefault("input", CallInput(node.name))
        if node is last:
            for hoisted in needed:
                copies[hoisted] = placeholder(step, hoisted.name, HoistedInput(hoisted.name))
                kept = {key: value for key, value in hoisted.meta.items() if key in ("spec", "path", "source")}
                copies[hoisted].meta.update(kept)
    for node in reversed(list(step.nodes)):
        unused = node.op in ("call_function", "get_attr") and not node.users
        absent = node.op == "placeholder" and not node.users and not _is_of_call(node)
        if unused or absent:
            step.erase_node(node)
    step.lint()
    return step
