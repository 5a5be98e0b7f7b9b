"""Turn markers into inputs and operations; afterwards the graph runs.

Before: ``unpack(f(pack(x)), load("output"))``
After:  ``scatter_sites(f(permute(gather_sites(flatten(x), active, 2))), slot_output, active, 2)`` reshaped as ``x``
        with the recorded values and the site tables as placeholders
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from fisedit_compiler.errors import LayoutError
from fisedit_compiler.geometry.conv_tables import ConvKey
from fisedit_compiler.graph import ir
from fisedit_compiler.graph.inputs import Input, SlotInput, TableInput
from fisedit_compiler.graph.layout import Layout
from fisedit_compiler.graph.site_order import SiteOrder
from fisedit_compiler.graph.sizes import level_name, row_symbol
from fisedit_compiler.graph.specs import ValueSpec, spec_of
from fisedit_compiler.passes.base import Program, Rewriter

aten = torch.ops.aten
fisedit = torch.ops.fisedit


def lower(program: Program) -> None:
    """Lower every marker of ``program.graph`` in place."""
    rewriter = Rewriter(program)
    graph = program.graph
    _free_of_strides(graph)
    for node in ir.nodes_calling(graph, [ir.pack]):
        _lower_pack(node, rewriter)
    for node in ir.nodes_calling(graph, [ir.unpack]):
        _lower_unpack(node, rewriter)
    graph.eliminate_dead_code()
    loaded = {str(node.args[0]) for node in ir.nodes_calling(graph, [ir.load])}
    loaded = {name for first in loaded for name in _with_what_it_is_about(first, program)}
    program.slots = {name: slot for name, slot in program.slots.items() if name in loaded}
    _Inputs(program).replace_markers()
    graph.eliminate_dead_code()
    graph.lint()


def _free_of_strides(graph: fx.Graph) -> None:
    """Let dense operations read values that lie otherwise in memory than captured ones, as unpacked maps do.

    Raises:
        LayoutError: an operation names places in memory.
    """
    for node in graph.nodes:
        if node.op != "call_function" or not node.meta.get("varies"):
            continue
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
        elif node.target in (aten.view.dtype, aten.view_as_complex.default):
            with graph.inserting_before(node):
                copied = graph.call_function(
                    aten.clone.default, node.args[:1], {"memory_format": torch.contiguous_format}
                )
            copied.meta = {key: value for key, value in node.args[0].meta.items() if key != "updates"}
            node.args = (copied, *node.args[1:])
        elif node.target is aten.as_strided.default:
            raise LayoutError(
                f"{ir.describe(node)} names places in memory, where an edit keeps only some sites. Write it with "
                "views, slices or unfold, or sparsify the submodule without it."
            )


def _lower_pack(node: fx.Node, rewriter: Rewriter) -> None:
    value = node.args[0]
    assert isinstance(value, fx.Node)
    layout: Layout = value.meta["layout"]
    assert layout.level is not None
    order = layout.flat
    flat = _in_order(value, order, node, rewriter)
    active = rewriter.active(layout.level, node)
    spec = order.spec(spec_of(value), row_symbol(layout.level))
    rows = rewriter.call(fisedit.gather_sites.default, (flat, active, order.site_dim), spec, node)
    rows = rewriter.permuted(rows, order.order_to(layout.packed), node)
    ir.stand_for(rows, node)
    node.replace_all_uses_with(rows)
    rewriter.graph.erase_node(node)


def _lower_unpack(node: fx.Node, rewriter: Rewriter) -> None:
    rows, base = node.args
    assert isinstance(rows, fx.Node) and isinstance(base, fx.Node)
    layout: Layout = node.meta["layout"]
    assert layout.level is not None
    order, dense = layout.flat, spec_of(node)
    flat = _in_order(base, order, node, rewriter)
    rows = rewriter.permuted(rows, layout.packed.order_to(order), node)
    active = rewriter.active(layout.level, node)
    args = (rows, flat, active, order.site_dim)
    result = rewriter.call(fisedit.scatter_sites.default, args, spec_of(flat), node)
    if order.sides == 2:
        spec = ValueSpec(tuple(dense.shape[axis] for axis in order.permutation), dense.dtype)
        sizes = [rewriter.sizes()(size) for size in spec.shape]
        result = rewriter.call(aten.reshape.default, (result, sizes), spec, node)
        result = rewriter.permuted(result, order.inverse, node)
    assert base.target is ir.load
    result.meta["updates"] = base.args[0]
    node.replace_all_uses_with(result)
    rewriter.graph.erase_node(node)


def _in_order(value: fx.Node, order: SiteOrder, node: fx.Node, rewriter: Rewriter) -> fx.Node:
    """What ``order.from_dense`` computes, as nodes."""
    spec = order.spec(spec_of(value))
    value = rewriter.permuted(value, order.permutation, node)
    if order.sides == 1:
        return value
    site = order.site_dim
    return rewriter.call(aten.flatten.using_ints, (value, site, site + 1), spec, node)


def _with_what_it_is_about(name: str, program: Program) -> Iterator[str]:
    while name:
        yield name
        name = program.slots[name].of


class _Inputs:
    """One placeholder per slot and per site table, behind the call's own inputs, and what readers get of each slot."""

    def __init__(self, program: Program) -> None:
        self.graph, self.slots, self.specs = program.graph, program.slots, program.loaded
        self._last = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
        self._made: dict[Input, fx.Node] = {}
        self._loaded: dict[str, fx.Node] = {}

    def replace_markers(self) -> None:
        for node in ir.nodes_calling(self.graph, [ir.load, ir.site_table]):
            if node.target is ir.load:
                with self.graph.inserting_before(node):
                    found = self._load(str(node.args[0]), spec_of(node))
            else:
                kind, key = str(node.args[0]), node.args[1]
                found = self._placeholder(TableInput(kind, key), _table_name(kind, key), node.meta)
            node.replace_all_uses_with(found)
            self.graph.erase_node(node)

    def _load(self, name: str, spec: ValueSpec) -> fx.Node:
        """What readers of a slot get, made at the graph's insertion point unless it is there already."""
        if name not in self._loaded:
            slot = self.slots[name]
            self.specs[name] = spec
            meta = {"spec": slot.stored_spec(spec), "varies": True}
            stored = self._placeholder(SlotInput(name), "slot_" + re.sub(r"\W", "_", name), meta)
            self._loaded[name] = found = slot.load(self.graph, stored, spec, self._load)
            if found is not stored:
                found.meta.update(spec=spec, loads=name)
        return self._loaded[name]

    def _placeholder(self, item: Input, name: str, meta: Mapping[str, Any]) -> fx.Node:
        if item not in self._made:
            with self.graph.inserting_after(self._last):
                self._last = self.graph.placeholder(ir.unused_name(self.graph, name))
            self._last.meta = {**meta, "input": item}
            self._made[item] = self._last
        return self._made[item]


def _table_name(kind: str, key: Any) -> str:
    if isinstance(key, ConvKey):
        kernel = "x".join(map(str, key.kernel))
        stride = f"s{key.stride[0]}" if key.stride != (1, 1) else ""
        dilation = f"d{key.dilation[0]}" if key.dilation != (1, 1) else ""
        upsample = f"u{key.upsample}" if key.upsample != 1 else ""
        geometry = f"k{kernel}{stride}{dilation}{upsample}"
        return f"{kind}_{level_name(key.source)}_to_{level_name(key.target)}_{geometry}"
    return f"{kind}_{level_name(key)}"
