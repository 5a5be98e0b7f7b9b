"""The dense baselines: a UNet under ``torch.compile`` in each form that may be the fastest one.

Sparse calls are compared with the strongest of them. A form is made of a copy, so that the UNet that is measured
sparsely keeps its weights as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

FORMS = ("contiguous", "channels_last", "fused")
"""As loaded; in channels_last; in channels_last with one product for the queries, keys and values of an attention."""
STRONGEST = "channels_last"


def compiled_unet(unet: Any, form: str = STRONGEST) -> Callable[..., Any]:
    """A UNet under ``torch.compile``, with CUDA graphs where it lies on a GPU.

    Args:
        unet: a diffusers UNet as it was loaded. It stays as it is.
        form: one of :data:`FORMS`.
    """
    if form != "contiguous":
        unet = copy.deepcopy(unet).to(memory_format=torch.channels_last)
    if form == "fused":
        unet.fuse_qkv_projections()
    on_gpu = next(unet.parameters()).is_cuda
    return torch.compile(unet, mode="reduce-overhead" if on_gpu else None, fullgraph=True)
