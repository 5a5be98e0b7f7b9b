"""Convolutions over sites.

Before: ``conv2d(x, weight, bias, stride, padding)``
After:  ``conv2d_sites(rows(x), load(x.input), ring, taps, places, pack_conv_weight(weight), bias, kernel, ...)``

Padding and a nearest upsampling in front are in the index tables ``ring`` and ``taps``; with an upsampling, the
recorded canvas is the small one in front of it. ``places`` says where in the computed blocks the active sites are. A
1x1 convolution reads no neighbour, so it is a linear layer on rows and records nothing.
"""

from __future__ import annotations

from typing import ClassVar

import sympy
import torch
from torch import fx

from fisedit_compiler.geometry.conv_tables import ConvKey
from fisedit_compiler.graph.layout import Layout
from fisedit_compiler.graph.sizes import level_name, row_symbol
from fisedit_compiler.graph.specs import ValueSpec, spec_of
from fisedit_compiler.passes.base import Pass, Rewriter, slot_name
from fisedit_compiler.passes.rewrites.upsample import upsampling_factor

aten = torch.ops.aten
MAP_AXES = (2, 3)


class Convolution(Pass):
    """``conv2d`` to ``conv2d_sites`` or, for 1x1 kernels, ``linear``."""

    name = "convolution"
    before = ("upsample",)  # an upsampling in front becomes part of the convolution's tables
    targets: ClassVar = frozenset({aten.conv2d.default})

    def rewrite(self, node: fx.Node, rewriter: Rewriter) -> str | None:
        x, weight, bias, stride, padding, dilation, groups = _arguments(node)
        layout: Layout = x.meta["layout"]
        if groups != 1:
            return f"a grouped convolution (groups={groups}) has no sparse form yet"
        if not layout.is_rows or layout.axes != MAP_AXES or layout.rank != 4:
            return f"the input is {layout}, not a [batch, channels, height, width] map"
        out_channels, in_channels, *kernel = (int(size) for size in spec_of(weight).shape)
        if kernel == [1, 1] and stride == (1, 1) and padding == (0, 0):
            flat = ValueSpec((sympy.Integer(out_channels), sympy.Integer(in_channels)), spec_of(weight).dtype)
            matrix = rewriter.constant(aten.view.default, (weight, [out_channels, in_channels]), flat, node)
            rows = rewriter.call(aten.linear.default, (rewriter.rows(x), matrix, bias), rewriter.row_spec(node), node)
            rewriter.replace(node, rows)
            return None
        source, upsample = x, 1
        factor = upsampling_factor(x)
        if factor is not None:
            source, upsample = x.args[0], factor  # type: ignore[assignment]
        key = ConvKey(
            source=source.meta["layout"].level,
            target=node.meta["layout"].level,
            kernel=(kernel[0], kernel[1]),
            stride=stride,
            padding=padding,
            dilation=dilation,
            upsample=upsample,
        )
        # Blocks and patches differ from plan to plan, as the ring does.
        taps = ValueSpec((_count(f"blocks_{level_name(key.target)}"), _count("patch")), torch.int64)
        ring = ValueSpec((_count("r"),), torch.int64)
        places = ValueSpec((row_symbol(key.target),), torch.int64)
        packed = ValueSpec(
            (sympy.Integer(out_channels), sympy.Integer(kernel[0] * kernel[1] * in_channels)), spec_of(weight).dtype
        )
        args = (
            rewriter.rows(source),
            rewriter.canvas(source, slot_name(node, "input"), node),
            rewriter.table("ring", key, ring, node),
            rewriter.table("taps", key, taps, node),
            rewriter.table("places", key.target, places, node),
            rewriter.constant(torch.ops.fisedit.pack_conv_weight.default, (weight,), packed, node),
            bias,
            list(key.kernel),
            list(key.stride),
            list(key.dilation),
        )
        rows = rewriter.call(torch.ops.fisedit.conv2d_sites.default, args, rewriter.row_spec(node), node)
        rewriter.replace(node, rows)
        return None


Pair = tuple[int, int]


def _count(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, nonnegative=True, integer=True)


def _arguments(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None, Pair, Pair, Pair, int]:
    defaults: list[object] = [None, None, None, [1, 1], [0, 0], [1, 1], 1]
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    values = [*node.args, *defaults[len(node.args) :]]
    values = [node.kwargs.get(name, value) for name, value in zip(names, values, strict=True)]
    x, weight, bias, stride, padding, dilation, groups = values
    return x, weight, bias, _pair(stride), _pair(padding), _pair(dilation), groups  # type: ignore[return-value]


def _pair(value: object) -> Pair:
    if isinstance(value, (list, tuple)):
        return (int(value[0]), int(value[-1]))
    return (int(value), int(value))  # type: ignore[call-overload]
