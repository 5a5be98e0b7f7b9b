"""Operations along one axis that is not a site axis: the axis number is all that changes.

Before: ``cat([x [B,C,H,W], skip [B,D,H,W]], 1)``, ``chunk(x [B,S,2C], 2, -1)``, ``softmax(x, -1)``
After:  ``cat([rows(x) [B,N,C], rows(skip) [B,N,D]], 2)``, ``chunk(rows(x), 2, 2)``, ``softmax(rows(x), 2)``
"""

from __future__ import annotations

import operator
from typing import Any, ClassVar

import torch
from torch import fx

from fisedit_compiler.graph import ir
from fisedit_compiler.graph.layout import Layout
from fisedit_compiler.graph.site_order import SITES
from fisedit_compiler.graph.specs import ValueSpec, spec_of
from fisedit_compiler.passes.base import Pass, Rewriter
from fisedit_compiler.passes.rewrites.rowwise import copy_on_rows

aten = torch.ops.aten

# Position of the axis argument of each operation, and its default.
AXIS_ARGUMENT: dict[Any, tuple[int, Any]] = {
    aten.softmax.int: (1, None),
    aten._softmax.default: (1, None),
    aten.slice.Tensor: (1, 0),
    aten.select.int: (1, 0),
    aten.narrow.default: (1, 0),
    aten.mean.dim: (1, None),
    aten.sum.dim_IntList: (1, None),
    aten.amax.default: (1, None),
    aten.amin.default: (1, None),
    aten.glu.default: (1, -1),
}
SPLITS: dict[Any, tuple[int, Any]] = {
    aten.chunk.default: (2, 0),
    aten.split.Tensor: (2, 0),
    aten.split_with_sizes.default: (2, 0),
}


class Concatenation(Pass):
    """``cat`` of spatial values along channels."""

    name = "concatenation"
    targets: ClassVar = frozenset({aten.cat.default, aten.concat.default, aten.concatenate.default})

    def rewrite(self, node: fx.Node, rewriter: Rewriter) -> str | None:
        values: Any = node.args[0]
        layout: Layout = node.meta["layout"]
        dim = node.args[1] if len(node.args) > 1 else 0
        packed = layout.packed_dim(dim)  # type: ignore[arg-type]
        if packed is None:
            return "values are put side by side along a site axis"
        for value in values:
            if not layout.has_sites_of(value.meta["layout"]):
                return f"operand {value.name} is {value.meta['layout']} but the result is {layout}"
        copy_on_rows(node, {}, rewriter, ([rewriter.rows(value) for value in values], packed))
        return None


class ChannelAxis(Pass):
    """Softmax, slices and reductions along an axis that is not a site axis."""

    name = "channel_axis"
    targets: ClassVar = frozenset(AXIS_ARGUMENT)

    def rewrite(self, node: fx.Node, rewriter: Rewriter) -> str | None:
        x = node.args[0]
        assert isinstance(x, fx.Node)
        layout: Layout = x.meta["layout"]
        if not layout.is_rows:
            return f"the input is {layout}"
        position, default = AXIS_ARGUMENT[node.target]
        args = [*node.args] + [default] * (position + 1 - len(node.args))
        axis: Any = args[position]
        axes = axis if isinstance(axis, (list, tuple)) else [axis]
        packed = [None if item is None else layout.packed_dim(item) for item in axes]
        if any(item is None for item in packed):
            return "the operation runs over a site axis"
        kept = _kept_axes(node, layout, [int(item) % layout.rank for item in axes])
        after: Layout = node.meta["layout"]
        if sorted(kept) != sorted(after.packed_axes()):
            return f"the input is {layout} and the result {after}"
        args[position] = packed if isinstance(axis, (list, tuple)) else packed[0]
        args[0] = rewriter.rows(x)
        self._replace(node, args, kept, rewriter)
        return None

    def _replace(self, node: fx.Node, args: list[Any], kept: list[int], rewriter: Rewriter) -> None:
        """Compute on rows, and bring what is left of their axes to the order of the result's."""
        order = [kept.index(axis) for axis in node.meta["layout"].packed_axes()]
        if order == sorted(order):
            copy_on_rows(node, {}, rewriter, args)
            return
        by_axis = dict(zip(node.meta["layout"].packed_axes(), rewriter.row_spec(node).shape, strict=True))
        spec = ValueSpec(tuple(by_axis[axis] for axis in kept), spec_of(node).dtype)
        rows = rewriter.call(node.target, args, spec, node)
        rows.kwargs = dict(node.kwargs)
        rewriter.replace(node, rewriter.permuted(rows, order, node))


def _kept_axes(node: fx.Node, layout: Layout, axes: list[int]) -> list[int]:
    """The result's dense axes in the order that the operation leaves the packed axes of ``layout`` in."""
    rank = node.meta["layout"].rank
    if rank == layout.rank:
        return list(layout.packed_axes())
    assert rank == layout.rank - len(axes), ir.describe(node)
    left = [axis for axis in layout.packed_axes() if axis not in axes]
    return [axis if axis == SITES else axis - sum(gone < axis for gone in axes) for axis in left]


class Split(Pass):
    """``chunk`` and ``split`` along channels, with their ``getitem`` readers."""

    name = "split"
    targets: ClassVar = frozenset(SPLITS)

    def wants(self, node: fx.Node) -> bool:
        return bool(node.meta.get("varies")) and node.args[0].meta["layout"].is_rows  # type: ignore[union-attr]

    def rewrite(self, node: fx.Node, rewriter: Rewriter) -> str | None:
        x = node.args[0]
        assert isinstance(x, fx.Node)
        layout: Layout = x.meta["layout"]
        position, default = SPLITS[node.target]
        args = [*node.args] + [default] * (position + 1 - len(node.args))
        packed = layout.packed_dim(args[position])  # type: ignore[arg-type]
        if packed is None:
            return "the value is split along a site axis"
        if any(user.target is not operator.getitem for user in node.users):
            return "the parts are used as a list"
        args[0], args[position] = rewriter.rows(x), packed
        specs = tuple(layout.row_spec(spec) for spec in node.meta["spec"])
        parts = rewriter.call(node.target, args, specs, node)
        for reader in list(node.users):
            index: Any = reader.args[1]
            item = rewriter.call(operator.getitem, (parts, index), specs[index], reader)
            rewriter.replace(reader, item)
        rewriter.graph.erase_node(node)
        return None
