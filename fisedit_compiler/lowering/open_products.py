"""Products that were cut, as the calls they are made of: what is read, the products, and their sum.

Before: ``linear(x, weight, bias)``
After:  ``sum_parts(products(x, weight, parts), bias)``
Before: ``convolution(rows, ring_rows, iota, taps, places, weight, bias, ...)``
After:  ``sum_parts(convolve_parts(readable_values(rows, ring_rows, iota), taps, places, weight, parts, ...), bias)``

Nothing is computed otherwise. But now a region of the graph (``repeated.py``) can begin and end at products, which a
GPU computes by kernels of their own in any case, and leave the sums to what reads them.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from fisedit_compiler.graph import ir
from fisedit_compiler.graph.specs import ValueSpec, spec_of
from fisedit_compiler.kernels.conv2d_sites import readable_values
from fisedit_compiler.kernels.matmul_parts import sum_parts
from fisedit_compiler.kernels.traits import no_products, traits_of
from fisedit_compiler.lowering import cut_products
from fisedit_compiler.lowering.cut_products import convolution, linear, products

aten = torch.ops.aten
fisedit = torch.ops.fisedit


def is_product(node: fx.Node) -> bool:
    """Whether a call multiplies matrices, so that a kernel of its own computes it."""
    flops = traits_of(node.target).flops
    return node.target in (products, linear, convolution) or (flops is not None and flops is not no_products)


def open_products(graph: fx.Graph) -> None:
    """Open the cut products of a lowered graph, in place; the last call of each takes over its name."""
    for node in list(graph.nodes):
        if node.target is linear:
            _open_linear(node)
        elif node.target is convolution:
            _open_convolution(node)


def _open_linear(node: fx.Node) -> None:
    rows, weight, bias = (*node.args, None)[:3]
    parts = _parts_of(weight)
    if parts == 1 and bias is None:
        node.target = aten.linear.default
        return
    made = _before(node, products, (rows, weight, parts), _in_parts(spec_of(node), parts))
    _sum(node, made, bias)


def _open_convolution(node: fx.Node) -> None:
    rows, canvas, ring, taps, places, weight, bias, *form = node.args
    kernel, stride, dilation = (*form, *((1, 1), (1, 1)))[:3]
    parts = _parts_of(weight)
    values = _before(node, readable_values, (rows, canvas, ring), None)
    if parts == 1:
        node.target = fisedit.convolve.default
        node.args = (values, taps, places, weight, bias, kernel, stride, dilation)
        return
    arguments = (values, taps, places, weight, parts, kernel, stride, dilation)
    made = _before(node, fisedit.convolve_parts.default, arguments, _in_parts(spec_of(node), parts))
    _sum(node, made, bias)


def _parts_of(weight: Any) -> int:
    outputs, inputs = (int(size) for size in spec_of(weight).shape)
    return cut_products.choose_parts(inputs, outputs)


def _in_parts(spec: ValueSpec, parts: int) -> ValueSpec:
    return ValueSpec((sympy.Integer(parts), *spec.shape), spec.dtype)


def _sum(node: fx.Node, parts: fx.Node, bias: Any) -> None:
    node.target = sum_parts
    node.args = (parts, bias)
    node.kwargs = {}


def _before(node: fx.Node, target: Any, arguments: tuple[Any, ...], spec: ValueSpec | None) -> fx.Node:
    with node.graph.inserting_before(node):
        return ir.call(node.graph, target, arguments, spec=spec, source=node, name=f"{_word(target)}_{node.name}")


def _word(target: Any) -> str:
    return ir.target_name(target).rsplit(".", 1)[-1]
