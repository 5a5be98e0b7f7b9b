"""Pointwise operations run on rows as they are.

Before: ``add(conv [B,C,H,W], temb [B,C,1,1])``
After:  ``add(rows(conv) [B,N,C], temb [B,1,C])``

Operands without sites are brought to the axis order of the rows; that little work is hoisted with them.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from fisedit_compiler.graph import ir
from fisedit_compiler.graph.layout import Layout
from fisedit_compiler.graph.site_order import SITES
from fisedit_compiler.graph.specs import ValueSpec, has_spec, spec_of
from fisedit_compiler.passes.base import Pass, Rewriter

aten = torch.ops.aten
COPIES = frozenset({aten.clone.default, aten.contiguous.default, aten.detach.default, aten.alias.default})
CASTS = frozenset({aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default})


def is_pointwise(target: Any) -> bool:
    """Whether an operation computes every element from the elements of the same place."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target in COPIES or target in CASTS:
        return True
    return torch.Tag.pointwise in target.tags and not target._schema.is_mutable


class Pointwise(Pass):
    """Any pointwise operation on rows; copies disappear (rows have one memory format)."""

    name = "pointwise"

    @classmethod
    def looks_for(cls, target: Any) -> bool:
        return is_pointwise(target)

    def rewrite(self, node: fx.Node, rewriter: Rewriter) -> str | None:
        layout: Layout = node.meta["layout"]
        operands = [argument for argument in node.all_input_nodes if has_spec(argument)]
        for operand in operands:
            problem = _operand_problem(operand, layout)
            if problem:
                return problem
        if node.target in COPIES:
            rewriter.replace(node, rewriter.rows(operands[0]))
            return None
        converted = {operand: self._operand(operand, layout, node, rewriter) for operand in operands}
        with rewriter.graph.inserting_before(node):
            rows = rewriter.graph.node_copy(node, lambda argument: converted.get(argument, argument))
        rows.kwargs = {key: value for key, value in rows.kwargs.items() if key not in ("memory_format", "layout")}
        rows.meta = {"spec": rewriter.row_spec(node), "varies": True}
        ir.inherit(rows, node)
        rewriter.replace(node, rows)
        return None

    def _operand(self, operand: fx.Node, layout: Layout, node: fx.Node, rewriter: Rewriter) -> fx.Node:
        if operand.meta["layout"].is_rows:
            return rewriter.rows(operand)
        if layout.kind == "tokens" or spec_of(operand).rank == 0:
            return operand  # axes keep their order, the token axis broadcasts
        return broadcast_operand(operand, layout, node, rewriter)


def _operand_problem(operand: fx.Node, layout: Layout) -> str | None:
    own: Layout = operand.meta["layout"]
    if own.kind in ("opaque", "concat"):
        return f"operand {operand.name} is {own}"
    if own.is_rows:
        shift = layout.rank - own.rank
        if own.kind != layout.kind or own.level != layout.level or tuple(a + shift for a in own.axes) != layout.axes:
            return f"operand {operand.name} is {own} but the result is {layout}"
        if shift:
            return f"operand {operand.name} has fewer axes than the result"
    return None


def broadcast_operand(operand: fx.Node, layout: Layout, node: fx.Node, rewriter: Rewriter) -> fx.Node:
    """Bring a non-spatial operand of a map to the axis order of the rows: ``[B, C, 1, 1]`` to ``[B, 1, C]``."""
    spec = spec_of(operand)
    value = operand
    while spec.rank < layout.rank:
        spec = ValueSpec((sympy.Integer(1), *spec.shape), spec.dtype)
        value = rewriter.constant(aten.unsqueeze.default, (value, 0), spec, node)
    dropped, kept = sorted(layout.axes)
    # Both site axes have size 1 here: drop one and let the other stand for the site axis.
    spec = ValueSpec(spec.shape[:dropped] + spec.shape[dropped + 1 :], spec.dtype)
    value = rewriter.constant(aten.select.int, (value, dropped, 0), spec, node)
    left = [axis for axis in range(layout.rank) if axis != dropped]
    order = [left.index(kept if axis == SITES else axis) for axis in layout.packed_axes()]
    spec = ValueSpec(tuple(spec.shape[axis] for axis in order), spec.dtype)
    return rewriter.constant(aten.permute.default, (value, order), spec, node)
