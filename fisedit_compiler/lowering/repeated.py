"""What repeats is compiled once: blocks of equal structure become calls of one region each (``regions.py``).

Before: ``a = products(norm_0, w_0, 2) ...  y_0 = products(z_0, v_0, 4)``  (of ``down_blocks.0.attentions.0``)
        ``a = products(norm_1, w_1, 2) ...  y_1 = products(z_1, v_1, 4)``  (of ``down_blocks.0.attentions.1``)
After:  ``y_0 = down_blocks_0_attentions_0(norm_0, w_0, ..., v_0)``
        ``y_1 = down_blocks_0_attentions_0(norm_1, w_1, ..., v_1)``

A block is what a module of the user's model computes, from its first product of matrices to its last. What lies between
two blocks, such as residuals and norms, stays outside, where a GPU computes it by one kernel as before. Blocks are
equal if they call the same operations on each other's results and on values of equal sizes, in ``b, h, w, n_s``: so
those of different levels differ. Weights are arguments.

Of blocks inside blocks those are taken that save most. A graph in which nothing repeats stays as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fisedit_compiler.graph import ir
from fisedit_compiler.graph.inputs import AddressInput, IotaInput, RingRowsInput, input_of
from fisedit_compiler.graph.specs import spec_of
from fisedit_compiler.lowering.blocks import Block, blocks_of
from fisedit_compiler.lowering.open_products import open_products
from fisedit_compiler.lowering.regions import Region

aten = torch.ops.aten
ADDRESSED = torch.ops.fisedit.attention_addressed.default
SUMS = torch.ops.fisedit.update_statistics_addressed.default
SMALLEST = 6
"""Calls of a block, at least."""


def outline_repeated(graph: fx.Graph) -> fx.Graph:
    """A graph that calls regions, made from a lowered one; that graph itself if nothing in it repeats."""
    opened = ir.copy_graph(graph)
    open_products(opened)
    _take_own_entries(opened)
    _match_rings(opened)
    chosen = choose(blocks_of(opened, SMALLEST))
    return _outlined(opened, chosen) if chosen else graph


def choose(blocks: Sequence[Block]) -> list[list[Block]]:
    """Lists of equal blocks, none of which lies in another: first those that save most calls."""
    equal: dict[object, list[Block]] = {}
    for block in blocks:
        if block.form is not None:
            equal.setdefault(block.form, []).append(block)
    taken: set[fx.Node] = set()
    chosen = []
    for group in sorted(equal.values(), key=lambda group: -(len(group) - 1) * len(group[0].nodes)):
        free = [block for block in group if taken.isdisjoint(block.nodes)]
        if len(free) > 1:
            taken.update(node for block in free for node in block.nodes)
            chosen.append(sorted(free, key=lambda block: block.start))
    return chosen


def of_one_length(ring_rows: Tensor, numbers: Tensor) -> Tensor:
    """The rows of a ring, after stating that there are as many as numbers.

    Rings of one geometry are equally long, but are arguments of their own: unless it is told, a compiler takes their
    lengths for different ones, and blocks that read them for different blocks.
    """
    torch._check(ring_rows.shape[1] == numbers.shape[0])
    return ring_rows


def _match_rings(graph: fx.Graph) -> None:
    places = {node: input_of(node) for node in graph.nodes if node.op == "placeholder"}
    numbers = {item.key: node for node, item in places.items() if isinstance(item, IotaInput)}
    for node, item in places.items():
        if isinstance(item, RingRowsInput) and item.key in numbers:
            with graph.inserting_before(_first_call(graph)):
                rows = ir.call(graph, of_one_length, (node, numbers[item.key]))
            node.replace_all_uses_with(rows, delete_user_cb=lambda user, rows=rows: user is not rows)


def _take_own_entries(graph: fx.Graph) -> None:
    """A call gets its own part of the table of addresses: entries' numbers in the whole one are nobody else's."""
    for node in ir.nodes_calling(graph, [SUMS]):
        *before, addresses, entry, recorded = node.args
        if isinstance(input_of(addresses), AddressInput) and isinstance(entry, int):
            with graph.inserting_before(_first_call(graph)):
                own = ir.call(graph, aten.slice.Tensor, (addresses, 0, entry, entry + 1))
            node.args = (*before, own, 0, recorded)
    for node in ir.nodes_calling(graph, [ADDRESSED]):
        arguments: tuple[Any, ...] = (*node.args, None)[:11]
        *before, addresses, key, value, scale = arguments
        if not isinstance(input_of(addresses), AddressInput):
            continue
        first = min(key, value)
        with graph.inserting_before(_first_call(graph)):
            entries = ir.call(graph, aten.slice.Tensor, (addresses, 0, first, max(key, value) + 1))
        node.args = (*before, entries, key - first, value - first, scale)


def _first_call(graph: fx.Graph) -> fx.Node:
    return next(node for node in graph.nodes if node.op in ("call_function", "output"))


def _outlined(graph: fx.Graph, chosen: Iterable[Sequence[Block]]) -> fx.Graph:
    """A graph with a call of a region in place of every chosen block."""
    last, inside, taken = {}, set[fx.Node](), set[str]()
    for blocks in chosen:
        region = Region(_name(blocks[0], taken), _graph_of(blocks[0]))
        target = region.as_target()
        for block in blocks:
            last[block.nodes[-1]] = (block, target)
            inside.update(block.nodes)
    outlined = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in last:
            _call(outlined, *last[node], mapping)
        elif node not in inside:
            mapping[node] = outlined.node_copy(node, mapping.__getitem__)
    outlined.lint()
    return outlined


def _name(block: Block, taken: set[str]) -> str:
    name = _word(block)
    names = (name, *(f"{name}_{number}" for number in range(1, len(taken) + 1)))
    found = next(each for each in names if each not in taken)
    taken.add(found)
    return found


def _word(block: Block) -> str:
    word = block.path.replace(".", "_")
    return word if word.isidentifier() else f"block_{word}"


def _graph_of(block: Block) -> fx.Graph:
    """The block's calls as a graph, from its inputs to its results."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for value in block.inputs:
        mapping[value] = argument = graph.placeholder(value.name)
        argument.meta = {key: value.meta[key] for key in ("spec", "layout") if key in value.meta}
    for size, axis in block.sizes.items():
        assert axis is not None, "a block without a form is no region"
        argument = mapping[block.inputs[axis[0]]]
        mapping[size] = ir.call(graph, aten.sym_size.int, (argument, axis[1]), name=size.name)
        mapping[size].meta["expr"] = size.meta["expr"]
    for node in block.nodes:
        mapping[node] = graph.node_copy(node, mapping.__getitem__)
    graph.output(tuple(mapping[value] for value in block.results))
    graph.lint()
    return graph


def _call(graph: fx.Graph, block: Block, target: object, mapping: dict[fx.Node, fx.Node]) -> None:
    """Call a block's region; what others read of the block gets the names that it had."""
    specs = tuple(map(spec_of, block.results))
    call = ir.call(graph, target, [mapping[value] for value in block.inputs], spec=specs, name=_word(block))
    call.meta["path"] = block.path
    for number, value in enumerate(block.results):
        mapping[value] = graph.create_node("call_function", operator.getitem, (call, number), name=value.name)
        mapping[value].meta = dict(value.meta)
    for view in block.views:
        mapping[view] = graph.node_copy(view, mapping.__getitem__)
