"""Operations that mix the channels of one site and nothing else.

Before: ``linear(x [B,S,C], weight, bias)``, ``layer_norm(x, [C], ...)``, ``matmul(x, weight)``
After:  the same operation on ``rows(x) [B,N,C]``
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import fx

from fisedit_compiler.graph import ir
from fisedit_compiler.graph.layout import Layout
from fisedit_compiler.graph.specs import has_spec
from fisedit_compiler.passes.base import Pass, Rewriter

aten = torch.ops.aten
NORMS = frozenset({aten.layer_norm.default, aten.rms_norm.default})
PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default})


class Rowwise(Pass):
    """Linear layers, LayerNorm, RMSNorm and products with non-spatial matrices."""

    name = "rowwise"
    targets: ClassVar = frozenset({aten.linear.default, *NORMS, *PRODUCTS})

    def rewrite(self, node: fx.Node, rewriter: Rewriter) -> str | None:
        x = node.args[0]
        assert isinstance(x, fx.Node)
        layout: Layout = x.meta["layout"]
        if not layout.is_rows:
            return f"the input is {layout}"
        width = len(node.args[1]) if node.target in NORMS else 1  # type: ignore[arg-type]
        if not keeps_trailing_axes(layout, width):
            return f"the operation runs over a site axis of a {layout} value"
        for operand in node.all_input_nodes:
            if operand is not x and has_spec(operand) and operand.meta["layout"].kind != "plain":
                return f"operand {operand.name} is spatial too ({operand.meta['layout']})"
        if node.target in PRODUCTS and layout.axes != (layout.rank - 2,):
            return "the sites are not the rows of the product"
        copy_on_rows(node, {x: rewriter.rows(x)}, rewriter)
        return None


def keeps_trailing_axes(layout: Layout, count: int) -> bool:
    """Whether the last ``count`` dense axes are not sites and are also last, in order, in the packed form."""
    trailing = tuple(range(layout.rank - count, layout.rank))
    return layout.packed_axes()[-count:] == trailing


def copy_on_rows(
    node: fx.Node, operands: dict[fx.Node, fx.Node], rewriter: Rewriter, args: Sequence[Any] | None = None
) -> fx.Node:
    """Copy ``node`` with operands (and optionally all arguments) replaced, and let the copy's rows replace it."""
    with rewriter.graph.inserting_before(node):
        rows = rewriter.graph.node_copy(node, lambda argument: operands.get(argument, argument))
    if args is not None:
        rows.args = tuple(args)
    rows.meta = {"spec": rewriter.row_spec(node), "varies": True}
    ir.inherit(rows, node)
    rewriter.replace(node, rows)
    return rows
