"""Products with few rows and large weights in parts that a GPU computes side by side.

Before: ``linear(x, weight, bias)``
After:  ``sum_parts(matmul_parts(x, weight, parts), bias)``
Before: ``conv2d_sites(rows, canvas, ring, taps, places, weight, bias, ...)``
After:  ``sum_parts(convolve_parts(cat([rows, canvas[:, ring], 0]), taps, places, weight, parts, ...), bias)``

For the step that Inductor compiles, which adds the parts up inside the kernel that reads the result. A product that
attention reads stays whole: its sum would be a kernel of its own. In how many parts is decided by the weight alone, so
one compilation serves every number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from fisedit_compiler.kernels.conv2d_sites import conv2d_sites, readable_values
from fisedit_compiler.kernels.convolve_parts import convolve_parts
from fisedit_compiler.kernels.matmul_parts import choose_parts, matmul_parts, sum_parts
from fisedit_compiler.kernels.traits import traits_of

aten = torch.ops.aten
fisedit = torch.ops.fisedit


def cut_products(graph: fx.Graph) -> None:
    """Cut the products of a step graph, in place."""
    for node in graph.nodes:
        if node.target is aten.linear.default and not _read_whole(node):
            node.target = linear
        elif node.target is fisedit.conv2d_sites.default:
            node.target = convolution
    graph.lint()


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``, cut if that pays; the bias is added with the parts, or by the next kernel too."""
    outputs, inputs = weight.shape
    parts = choose_parts(inputs, outputs)
    if parts == 1 and bias is None:
        return torch.nn.functional.linear(rows, weight)
    return sum_parts(products(rows, weight, parts), bias)


def products(rows: Tensor, weight: Tensor, parts: int) -> Tensor:
    """``matmul_parts`` of rows of any rank ``[..., K]``: ``[parts, ..., O]``."""
    outputs, inputs = weight.shape
    return matmul_parts(rows.reshape(-1, inputs), weight, parts).reshape(parts, *rows.shape[:-1], outputs)


def convolution(
    rows: Tensor, canvas: Tensor, ring: Tensor, taps: Tensor, places: Tensor, weight: Tensor, bias: Tensor | None,
    kernel: Sequence[int], stride: Sequence[int] = (1, 1), dilation: Sequence[int] = (1, 1),
) -> Tensor:  # fmt: skip
    """``fisedit::conv2d_sites``, cut if that pays."""
    outputs, inputs = weight.shape
    parts = choose_parts(inputs, outputs)
    if parts == 1:
        return conv2d_sites(rows, canvas, ring, taps, places, weight, bias, kernel, stride, dilation)
    values = readable_values(rows, canvas, ring)
    return sum_parts(convolve_parts(values, taps, places, weight, parts, kernel, stride, dilation), bias)


def _read_whole(node: fx.Node) -> bool:
    """Whether an op that is not fused with others reads the value, or a view of it."""
    readers = ((user, traits_of(user.target)) for user in node.users)
    return any(traits.reads_whole or (traits.regroups and _read_whole(user)) for user, traits in readers)
