"""GroupNorm over sites.

Before: ``group_norm(x, groups, weight, bias, eps)``
After, ``norm="recorded"``:
    ``group_norm_sites(rows(x), load(statistics), weight, bias, groups, eps)``
After, ``norm="incremental"``:
    ``group_norm_sites(rows(x), update_statistics(rows(x), load(statistics), load(site_sums), active), ...)``

Recorded statistics are FISEdit's approximate normalization; incremental ones are exact for the pinned canvas.
"""

from __future__ import annotations

from typing import ClassVar

import sympy
import torch
from torch import fx

from fisedit_compiler.graph.layout import Layout
from fisedit_compiler.graph.site_order import SITES
from fisedit_compiler.graph.sizes import row_symbol
from fisedit_compiler.graph.specs import ValueSpec, spec_of
from fisedit_compiler.passes.base import Pass, Rewriter, slot_name
from fisedit_compiler.slots.site_sums import SiteSums
from fisedit_compiler.slots.statistics import Statistics

aten = torch.ops.aten
fisedit = torch.ops.fisedit
CHANNELS_LAST = (0, SITES, 1)
"""Axes of the rows that the operation takes, as those of the value."""


class GroupNorm(Pass):
    """``group_norm`` to ``group_norm_sites`` with recorded or corrected statistics."""

    name = "group_norm"
    targets: ClassVar = frozenset({aten.group_norm.default})

    def rewrite(self, node: fx.Node, rewriter: Rewriter) -> str | None:
        x, groups, weight, bias, eps, *_ = [*node.args, None, None, 1e-5][: max(len(node.args), 5)]
        assert isinstance(x, fx.Node) and isinstance(groups, int)
        layout: Layout = x.meta["layout"]
        if not layout.is_rows or 1 in layout.axes or 0 in layout.axes:
            return f"the input is {layout} without a [batch, channels, sites] order"
        if set(layout.axes) != set(range(2, layout.rank)):
            return "axes other than sites are normalised together with channels"
        if layout.axes != tuple(range(2, layout.rank)):
            return "width comes before height"
        assert layout.level is not None
        batch, channels = spec_of(x).shape[0], spec_of(x).shape[1]
        packed = layout.packed_axes()  # of a map (0, SITES, 1) already, of tokens (0, 1, SITES)
        rows = rewriter.permuted(rewriter.rows(x), [packed.index(axis) for axis in CHANNELS_LAST], node)
        pair = (sympy.Integer(groups), sympy.Integer(2))
        corrected = rewriter.program.config.norm == "incremental"
        statistics_slot = rewriter.slot(slot_name(node, "statistics"), x, Statistics(groups, corrected))
        statistics = rewriter.load(statistics_slot, ValueSpec((batch, *pair), torch.float32), node)
        if corrected:
            kind = SiteSums(groups, int(channels))
            slot = rewriter.slot(slot_name(node, "site_sums"), x, kind, of=str(statistics.args[0]))
            sums_spec = ValueSpec((batch, rewriter.site_count(layout.level), *pair), torch.float32)
            sums = rewriter.load(slot, sums_spec, node)
            active = rewriter.active(layout.level, node)
            statistics = rewriter.call(
                fisedit.update_statistics.default, (rows, statistics, sums, active), spec_of(statistics), node
            )
        spec = ValueSpec((batch, row_symbol(layout.level), channels), spec_of(node).dtype)
        args = (rows, statistics, weight, bias, groups, eps)
        result = rewriter.call(fisedit.group_norm_sites.default, args, spec, node)
        rewriter.replace(node, rewriter.permuted(result, [CHANNELS_LAST.index(axis) for axis in packed], node))
        return None
