"""The dense baselines: a UNet under ``torch.compile`` in each form that may be the fastest one.

Sparse calls are compared with the strongest of them. A form is made of a copy, so that the UNet that is measured
sparsely keeps its weights as they are.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

FORMS = ("contiguous", "channels_last", "fused")
"""As loaded; in channels_last; in channels_last with one product for the queries, keys and values of an attention."""
STRONGEST = "channels_last"
NO_FORM = "none"
"""What the option for a form takes where a compiled baseline may be left out."""
EAGER = "eager"
BASELINES = (EAGER, "eager channels_last", "compiled channels_last", "compiled contiguous")
"""Dense calls on a CPU that may be the fastest one."""


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


def dense_baseline(unet: Any, name: str) -> Callable[..., Any]:
    """The UNet as one of :data:`BASELINES` runs it; the UNet itself stays as it is."""
    way, _, form = name.partition(" ")
    if way == "compiled":
        return compiled_unet(unet, form)
    return copy.deepcopy(unet).to(memory_format=torch.channels_last) if form else unet  # type: ignore[no-any-return]


def mark_strongest(rows: Sequence[dict[str, Any]], baselines: Sequence[str]) -> str:
    """Set ``strongest`` in every row: whether its baseline is that one of ``baselines`` with the smallest median.

    A dense call does not depend on the mask, so there is one such baseline for all areas; its name is returned.
    """

    def median(name: str) -> float:
        return statistics.median(row["baseline_ms"] for row in rows if row["baseline"] == name)

    strongest = min(baselines, key=median)
    for row in rows:
        row["strongest"] = row["baseline"] == strongest
    return strongest
