"""FLOPs as torch counts them while something runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fisedit_compiler.kernels.registry import registered_ops


class Unfold(TorchDispatchMode):
    """Runs the references of ``fisedit::`` operations where other modes see them, nested ones too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "fisedit":
            return func(*args, **(kwargs or {}))
        with self:
            return registered_ops()[func._opname].reference(*args, **(kwargs or {}))


def counted(run: Callable[[], Any]) -> int:
    """FLOPs that torch counts while ``run`` runs."""
    counter = FlopCounterMode(display=False)
    # The fused CPU attention is none that torch counts; the plain one is made of products that it does.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter, Unfold():
        run()
    return int(counter.get_total_flops())
