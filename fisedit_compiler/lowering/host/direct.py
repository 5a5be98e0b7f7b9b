"""Call operations as the functions that they are: this package's references, and PyTorch's own bindings.

Before: ``torch.ops.fisedit.attention_sites.default(q, k, v, ...)``, ``torch.ops.aten.permute.default(x, dims)``
After:  the reference, and ``torch.permute``, called with the same arguments

On a CPU the dispatcher calls a reference, a Python function, and comes back to Python for it. ``torch.ops`` reads its
arguments by their schema, PyTorch's bindings in code that was made for each. Either saves some microseconds of each of
hundreds of calls. Profilers see all of them as before (``named.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fisedit_compiler.kernels.registry import NAMESPACE, op_of
from fisedit_compiler.lowering.host.named import compute_by

_BINDINGS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.add.Tensor: torch.add,
    torch.ops.aten.mul.Tensor: torch.mul,
    torch.ops.aten.permute.default: torch.permute,
    torch.ops.aten.reshape.default: torch.reshape,
    torch.ops.aten.layer_norm.default: torch.layer_norm,
    torch.ops.aten.silu.default: torch._C._nn.silu,
    torch.ops.aten.linear.default: torch._C._nn.linear,
    torch.ops.aten.chunk.default: torch.chunk,
}
"""Functions that take the same arguments in the same order."""


def call_directly(graph: fx.Graph) -> None:
    """Change the calls of operations that have no kernel for a CPU other than their reference, and of PyTorch's."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        op = op_of(node.target)
        if op is not None and op.overload.namespace == NAMESPACE and op.implementation("CPU") is op.reference:
            compute_by(op.reference, node)
        elif not node.kwargs:
            node.target = _BINDINGS.get(node.target, node.target)
