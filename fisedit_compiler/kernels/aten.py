"""The traits of PyTorch's own operations, one row an operation; what is missing here is told by its schema, or unknown.

Operations that regroup or reorder axes are listed in ``graph/views.py``, where their axes are followed.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from fisedit_compiler.graph.views import PERMUTATIONS, VIEWS
from fisedit_compiler.kernels.formulas import (
    added_product_flops,
    attention_flops,
    convolution_flops,
    product_flops,
    transposed_convolution_flops,
)
from fisedit_compiler.kernels.traits import OpTraits, describe, no_products, nothing_moved, regrouping

aten = torch.ops.aten

_CONVOLUTION = OpTraits(flops=convolution_flops)
_TRANSPOSED = OpTraits(flops=transposed_convolution_flops)
_PRODUCT = OpTraits(flops=product_flops)
_ADDED_PRODUCT = OpTraits(flops=added_product_flops)
_NO_PRODUCTS = OpTraits(flops=no_products)

ATEN: dict[Any, OpTraits] = {
    **{operation: regrouping(operation) for operation in (*VIEWS, *PERMUTATIONS, aten.split_with_sizes.default)},
    operator.getitem: OpTraits(flops=no_products, bytes=nothing_moved, regroups=True),
    # -- products
    aten.conv1d.default: _CONVOLUTION,
    aten.conv2d.default: _CONVOLUTION,
    aten.conv3d.default: _CONVOLUTION,
    aten.conv_transpose1d.default: _TRANSPOSED,
    aten.conv_transpose2d.input: _TRANSPOSED,
    aten.conv_transpose3d.input: _TRANSPOSED,
    aten.linear.default: _PRODUCT,
    aten.matmul.default: _PRODUCT,
    aten.mm.default: _PRODUCT,
    aten.bmm.default: _PRODUCT,
    aten.addmm.default: _ADDED_PRODUCT,
    aten.baddbmm.default: _ADDED_PRODUCT,
    aten.scaled_dot_product_attention.default: OpTraits(flops=attention_flops, reads_whole=True),
    # -- without products, though no tag says so
    aten.amax.default: _NO_PRODUCTS,
    aten.amin.default: _NO_PRODUCTS,
    aten.arange.default: _NO_PRODUCTS,
    aten.arange.start: _NO_PRODUCTS,
    aten.arange.start_step: _NO_PRODUCTS,
    aten._softmax.default: _NO_PRODUCTS,
    aten.cat.default: _NO_PRODUCTS,
    aten.concat.default: _NO_PRODUCTS,
    aten.constant_pad_nd.default: _NO_PRODUCTS,
    aten.embedding.default: _NO_PRODUCTS,
    aten.full.default: _NO_PRODUCTS,
    aten.glu.default: _NO_PRODUCTS,
    aten.group_norm.default: _NO_PRODUCTS,
    aten.layer_norm.default: _NO_PRODUCTS,
    aten.mean.default: _NO_PRODUCTS,
    aten.mean.dim: _NO_PRODUCTS,
    aten.ones.default: _NO_PRODUCTS,
    aten.pad.default: _NO_PRODUCTS,
    aten.repeat.default: _NO_PRODUCTS,
    aten.rms_norm.default: _NO_PRODUCTS,
    aten.softmax.int: _NO_PRODUCTS,
    aten.stack.default: _NO_PRODUCTS,
    aten.sum.default: _NO_PRODUCTS,
    aten.sum.dim_IntList: _NO_PRODUCTS,
    aten.upsample_nearest2d.default: _NO_PRODUCTS,
    aten.upsample_nearest2d.vec: _NO_PRODUCTS,
    aten.zeros.default: _NO_PRODUCTS,
    # -- views by their schema, but in a graph because they copy
    aten.contiguous.default: _NO_PRODUCTS,
    aten.to.dtype: _NO_PRODUCTS,
    aten.to.dtype_layout: _NO_PRODUCTS,
    aten.to.device: _NO_PRODUCTS,
}
describe(ATEN)
