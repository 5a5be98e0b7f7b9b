"""How a staged step becomes GPU code: torch.compile, with Inductor taking the ``fisedit::`` ops apart that it can fuse.

Normalisation, gathers and scatters are pointwise or copies to it. A convolution is taken apart into a fused kernel that
writes everything it reads side by side, and ``convolve``, which chooses by its table between taps and patches when it
runs: so one compilation serves every block size. Attention stays whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fisedit_compiler.kernels.registry import registered_ops

_REFERENCES = ("conv2d_sites", "gather_sites", "scatter_sites", "group_norm_sites", "update_statistics")


def compile_step(step: fx.GraphModule) -> Callable[..., Any]:
    """The step under torch.compile: one compilation for every mask, row counts symbolic."""
    return torch.compile(step, fullgraph=True, backend=_inductor)


def _inductor(graph: fx.GraphModule, example_inputs: Any) -> Any:
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    ops = registered_ops()
    inlined = {ops[name].overload: ops[name].reference for name in _REFERENCES}
    return compile_fx(graph, example_inputs, decompositions={**select_decomp_table(), **inlined})
