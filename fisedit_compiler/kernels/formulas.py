"""FLOPs of products as ``torch.utils.flop_counter`` counts them: two for a multiplication with its addition.

Each is a :data:`~fisedit_compiler.kernels.traits.Formula`, or a part of one; operations name them in their traits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy

from fisedit_compiler.graph.sizes import in_blocks
from fisedit_compiler.graph.specs import ValueSpec, elements


def convolution_flops(args: list[Any], out: ValueSpec) -> sympy.Expr:
    """``args[1]`` is the weight ``[O, C, *kernel]``."""
    return 2 * elements(out.shape) * elements(args[1].shape[1:])


def transposed_convolution_flops(args: list[Any], out: ValueSpec) -> sympy.Expr:
    """``args[1]`` is the weight ``[C, O, *kernel]``."""
    return 2 * elements(args[0].shape) * elements(args[1].shape[1:])


def product_flops(args: list[Any], out: ValueSpec) -> sympy.Expr:
    """``args[0]`` is the left factor ``[..., K]``."""
    return 2 * elements(out.shape) * args[0].shape[-1]


def added_product_flops(args: list[Any], out: ValueSpec) -> sympy.Expr:
    """A product that something is added to, which comes first."""
    return product_flops(args[1:], out)


def attention_flops(args: list[Any], out: ValueSpec) -> sympy.Expr:
    """``args[0]`` are the queries ``[..., N, d]``, ``args[1]`` the keys ``[..., T, d]``."""
    return attend_flops(args[0], args[1].shape[-2], out)


def canvas_attention_flops(args: list[Any], out: ValueSpec) -> sympy.Expr:
    """``args[0]`` are the queries ``[..., N, d]``, ``args[3]`` the recorded keys ``[..., S, d]``."""
    return attend_flops(args[0], args[3].shape[-2], out)


def attend_flops(query: ValueSpec, keys: sympy.Expr, out: ValueSpec) -> sympy.Expr:
    """Logits and the weighted mean, for a number of keys."""
    return 2 * keys * elements(out.shape[:-1]) * (query.shape[-1] + out.shape[-1])


def sites_convolution_flops(weight: ValueSpec, kernel: Sequence[int], out: ValueSpec) -> sympy.Expr:
    """A convolution at active sites with a packed weight ``[O, K*C]``: what is in their blocks is computed, too."""
    batch, rows = out.shape[-3:-1]
    computed = rows if list(kernel) == [1, 1] else in_blocks(rows)
    return 2 * batch * computed * elements(weight.shape)
