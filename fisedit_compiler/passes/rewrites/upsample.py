"""Nearest upsampling that no convolution swallows: every fine site copies the row of the coarse site above it.

Before: ``upsample_nearest2d(x, scale_factors=[2, 2])``
After:  ``gather_sites(rows(x), parents)``

The parent of an active site is always active, so nothing is recorded.
"""

from __future__ import annotations

from fractions import Fraction
from typing import ClassVar

import sympy
import torch
from torch import fx

from fisedit_compiler.geometry.conv_tables import ConvKey
from fisedit_compiler.graph.layout import Layout
from fisedit_compiler.graph.sizes import row_symbol
from fisedit_compiler.graph.specs import ValueSpec
from fisedit_compiler.passes.base import Pass, Rewriter

aten = torch.ops.aten
UPSAMPLINGS = frozenset({aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default})


def upsampling_factor(node: fx.Node) -> int | None:
    """The whole factor of a nearest upsampling of a ``[B, C, H, W]`` map, ``None`` for anything else."""
    if node.op != "call_function" or node.target not in UPSAMPLINGS:
        return None
    before, after = node.args[0].meta["layout"], node.meta["layout"]  # type: ignore[union-attr]
    if not (before.is_rows and after.is_rows) or before.axes != (2, 3) or before.rank != 4:
        return None
    factor = Fraction(before.level) / Fraction(after.level)
    return int(factor) if factor.denominator == 1 and factor > 1 else None


class Upsample(Pass):
    """``upsample_nearest2d`` to a gather of parents' rows."""

    name = "upsample"
    targets: ClassVar = UPSAMPLINGS

    def rewrite(self, node: fx.Node, rewriter: Rewriter) -> str | None:
        factor = upsampling_factor(node)
        if factor is None:
            return "only nearest upsampling by a whole factor has a sparse form"
        source = node.args[0]
        assert isinstance(source, fx.Node)
        before: Layout = source.meta["layout"]
        after: Layout = node.meta["layout"]
        assert before.level is not None and after.level is not None
        key = ConvKey(before.level, after.level, (1, 1), (1, 1), (0, 0), (1, 1), factor)
        rows_symbol = row_symbol(after.level)
        taps = rewriter.table("taps", key, ValueSpec((rows_symbol, sympy.Integer(1)), torch.int64), node)
        parents = rewriter.call(aten.select.int, (taps, 1, 0), ValueSpec((rows_symbol,), torch.int64), node)
        gather = torch.ops.fisedit.gather_sites.default
        rows = rewriter.call(gather, (rewriter.rows(source), parents, 1), rewriter.row_spec(node), node)
        rewriter.replace(node, rows)
        return None
