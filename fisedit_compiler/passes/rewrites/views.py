"""Operations that only rename, regroup or reorder axes.

Before: ``view(x [B,S,C], [B, -1, heads, C/heads])``, ``permute(x [B,C,H,W], [0,2,3,1])``, ``unsqueeze(x, 2)``
After:  ``view(rows(x) [B,N,C], [B, -1, heads, C/heads])``, nothing at all, ``unsqueeze(rows(x), 2)``

Maps and tokens of one level have the same rows up to their order of axes, so most of these vanish.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import fx

from fisedit_compiler.graph.layout import Layout
from fisedit_compiler.graph.site_order import SITES
from fisedit_compiler.graph.specs import ValueSpec, spec_of
from fisedit_compiler.graph.views import PERMUTATIONS, RANK_CHANGES, VIEWS, Group, order_of, view_groups
from fisedit_compiler.passes.base import Pass, Rewriter

aten = torch.ops.aten


class Permute(Pass):
    """``permute``, ``transpose`` and their other spellings."""

    name = "permute"
    targets: ClassVar = PERMUTATIONS

    def rewrite(self, node: fx.Node, rewriter: Rewriter) -> str | None:
        x = node.args[0]
        assert isinstance(x, fx.Node)
        before: Layout = x.meta["layout"]
        after: Layout = node.meta["layout"]
        if not before.is_rows:
            return f"the input is {before}"
        order = order_of(node, before.rank)
        sources = [SITES if axis == SITES else order[axis] for axis in after.packed_axes()]
        packed = [before.packed_axes().index(axis) for axis in sources]
        rewriter.replace(node, rewriter.permuted(rewriter.rows(x), packed, node))
        return None


class View(Pass):
    """``view``, ``reshape``, ``flatten`` and ``unflatten`` that keep sites apart from everything else."""

    name = "view"
    targets: ClassVar = VIEWS

    def rewrite(self, node: fx.Node, rewriter: Rewriter) -> str | None:
        x = node.args[0]
        assert isinstance(x, fx.Node)
        before: Layout = x.meta["layout"]
        after: Layout = node.meta["layout"]
        if not before.is_rows:
            return f"the input is {before}"
        groups = view_groups(spec_of(x).shape, spec_of(node).shape)
        if groups is None:
            return "its axes cannot be matched with its input's"
        # The input's axes so that those of a group lie side by side, the new axes in that order, the output's order.
        old_axes, new_axes = _regrouped(groups, before, after)
        if sorted(axis for axis in new_axes if axis != SITES) != sorted(set(range(after.rank)) - set(after.axes)):
            return "its axes are regrouped across the packed order"
        packed = before.packed_axes()
        rows = rewriter.permuted(rewriter.rows(x), [packed.index(axis) for axis in old_axes], node)
        row_shape = rewriter.row_spec(node).shape
        by_axis = dict(zip(after.packed_axes(), row_shape, strict=True))
        spec = ValueSpec(tuple(by_axis[axis] for axis in new_axes), spec_of(rows).dtype)
        if spec.shape != spec_of(rows).shape:
            sizes: list[Any] = [-1 if axis == SITES else rewriter.sizes()(by_axis[axis]) for axis in new_axes]
            rows = rewriter.call(aten.reshape.default, (rows, sizes), spec, node)
        rows = rewriter.permuted(rows, [new_axes.index(axis) for axis in after.packed_axes()], node)
        rewriter.replace(node, rows)
        return None


def _regrouped(groups: list[Group], before: Layout, after: Layout) -> tuple[list[int], list[int]]:
    """Packed axes of a view's input, and what they become: of the output, group by group.

    A group of several axes (a batch that takes in half of the channels) is one run of elements only if nothing, such as
    the sites of a map, lies between its axes.
    """
    runs = {left[0]: (left, right) for left, right in groups if left and not set(left) & set(before.axes)}
    inside = {axis for left, _ in runs.values() for axis in left[1:]}
    old_axes: list[int] = []
    new_axes: list[int] = []
    for axis in before.packed_axes():
        if axis == SITES:
            old_axes.append(SITES)
            new_axes.append(SITES)
        elif axis not in inside:
            left, right = runs[axis]
            old_axes.extend(left)
            new_axes.extend(right)
    for left, right in groups:
        if not left and not set(right) & set(after.axes):
            new_axes.extend(right)  # axes of size one that belong to no input axis
    return old_axes, new_axes


class RankChange(Pass):
    """``unsqueeze`` and ``squeeze`` of axes that are not sites."""

    name = "rank_change"
    targets: ClassVar = RANK_CHANGES

    def rewrite(self, node: fx.Node, rewriter: Rewriter) -> str | None:
        x = node.args[0]
        assert isinstance(x, fx.Node)
        before: Layout = x.meta["layout"]
        after: Layout = node.meta["layout"]
        if not before.is_rows or before.kind != after.kind:
            return f"the input is {before} and the result {after}"
        if node.target is aten.unsqueeze.default:
            dim = int(node.args[1]) % after.rank  # type: ignore[arg-type]
            new_axes = [axis if axis == SITES else axis + (axis >= dim) for axis in before.packed_axes()]
            position = after.packed_axes().index(dim)
            new_axes.insert(position, dim)
            spec_axes = dict(zip(after.packed_axes(), rewriter.row_spec(node).shape, strict=True))
            spec = ValueSpec(tuple(spec_axes[axis] for axis in new_axes), spec_of(node).dtype)
            rows = rewriter.call(aten.unsqueeze.default, (rewriter.rows(x), position), spec, node)
        else:
            dims: Any = node.args[1]
            dense = [dim % before.rank for dim in (dims if isinstance(dims, (list, tuple)) else [dims])]
            dropped = [axis for axis in dense if spec_of(x).shape[axis] == 1]
            packed = [before.packed_dim(axis) for axis in dropped]
            if any(axis is None for axis in packed):
                return "a site axis is squeezed"
            kept = [axis for axis in before.packed_axes() if axis not in dropped]
            renumber = {axis: axis - sum(drop < axis for drop in dropped) for axis in kept if axis != SITES}
            new_axes = [SITES if axis == SITES else renumber[axis] for axis in kept]
            spec_axes = dict(zip(after.packed_axes(), rewriter.row_spec(node).shape, strict=True))
            spec = ValueSpec(tuple(spec_axes[axis] for axis in new_axes), spec_of(node).dtype)
            rows = rewriter.call(aten.squeeze.dims, (rewriter.rows(x), packed), spec, node)
        rows = rewriter.permuted(rows, [new_axes.index(axis) for axis in after.packed_axes()], node)
        rewriter.replace(node, rows)
        return None
