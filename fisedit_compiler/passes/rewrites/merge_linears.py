"""Linear layers that read the same rows become one.

Before: ``q = linear(rows, to_q); k = linear(rows, to_k); v = linear(rows, to_v)``
After:  ``q, k, v = split(linear(rows, cat([to_q, to_k, to_v])), [...], 2)``

A sparse step is bound by its number of kernels; the concatenated weight is hoisted. Applies to self-attention's
projections, and to any other siblings.
"""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch import fx

from fisedit_compiler.graph import ir
from fisedit_compiler.graph.specs import ValueSpec, spec_of
from fisedit_compiler.passes.base import GraphPass, Program, Rewriter

aten = torch.ops.aten


class MergeLinears(GraphPass):
    """Sibling linear layers on rows to one linear layer and a split."""

    name = "merge_linears"
    after = ("extensions", "convolution", "rowwise")  # whatever puts linear layers on rows

    def run(self, program: Program) -> None:
        rewriter = Rewriter(program)
        siblings: dict[tuple[fx.Node, bool], list[fx.Node]] = {}
        for node in program.graph.nodes:
            if _is_plain_layer(node):
                key = (node.args[0], _bias(node) is None)
                siblings.setdefault(key, []).append(node)
        for nodes in siblings.values():
            if len(nodes) > 1:
                _merge(nodes, rewriter)
        program.graph.eliminate_dead_code()


def _is_plain_layer(node: fx.Node) -> bool:
    """A linear layer on rows whose matrix and bias depend on no image: they are known before its siblings run."""
    if node.target is not aten.linear.default or not node.meta.get("varies") or "layout" in node.meta:
        return False
    operands = [operand for operand in (node.args[1], _bias(node)) if isinstance(operand, fx.Node)]
    return spec_of(operands[0]).rank == 2 and not any(operand.meta.get("varies") for operand in operands)


def _bias(node: fx.Node) -> fx.Node | None:
    bias: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    return bias


def _merge(nodes: list[fx.Node], rewriter: Rewriter) -> None:
    first = nodes[0]
    weights: list[Any] = [node.args[1] for node in nodes]
    widths = [int(spec_of(weight).shape[0]) for weight in weights]
    for node in nodes:
        for operand in (node.args[1], _bias(node)):
            if isinstance(operand, fx.Node):
                _bring_before(operand, first)
    dtype, columns = spec_of(weights[0]).dtype, spec_of(weights[0]).shape[1]
    total = sympy.Integer(sum(widths))
    weight = rewriter.constant(aten.cat.default, (weights, 0), ValueSpec((total, columns), dtype), first)
    bias = None
    if _bias(first) is not None:
        biases = [_bias(node) for node in nodes]
        bias = rewriter.constant(aten.cat.default, (biases, 0), ValueSpec((total,), dtype), first)
    rows = spec_of(first)
    axis = rows.rank - 1
    joined_spec = ValueSpec((*rows.shape[:-1], total), rows.dtype)
    joined = rewriter.call(aten.linear.default, (first.args[0], weight, bias), joined_spec, first)
    specs = tuple(spec_of(node) for node in nodes)
    parts = rewriter.call(aten.split_with_sizes.default, (joined, widths, axis), specs, first)
    items = [rewriter.call(operator.getitem, (parts, index), spec, first) for index, spec in enumerate(specs)]
    for node, item in zip(nodes, items, strict=True):
        item.meta.update({key: node.meta[key] for key in ("path", "source", "origin") if key in node.meta})
        ir.stand_for(item, node)
        node.replace_all_uses_with(item)
        rewriter.graph.erase_node(node)


def _bring_before(node: fx.Node, anchor: fx.Node) -> None:
    """Move a weight, and what it is computed from, in front of the first sibling."""
    if node > anchor:
        for source in node.all_input_nodes:
            _bring_before(source, anchor)
        anchor.prepend(node)
