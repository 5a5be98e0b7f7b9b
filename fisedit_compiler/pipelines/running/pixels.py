"""Pictures off the device: rounded to bytes there and copied once, with the pixels that diffusers gives.

``VaeImageProcessor`` copies floating-point numbers to the host and rounds them there, in three passes over four times
as many bytes. Rounding is the same sum wherever it is done: ``x * 255`` in float32, to the nearest, ties to even.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor

_REPLACEABLE = frozenset({"postprocess", "pt_to_numpy", "numpy_to_pil"})


def gives_tensors(pipe: Any, options: Mapping[str, Any]) -> bool:
    """Whether a pipeline, asked for tensors (``output_type="pt"``), returns what it would make pictures of.

    Those of diffusers do, with its own processor. One of the user's may do anything.

    Args:
        pipe: the pipeline.
        options: further arguments of its call.
    """
    from diffusers.image_processor import VaeImageProcessor

    processor = getattr(pipe, "image_processor", None)
    is_stock = type(processor) is VaeImageProcessor and type(pipe).__module__.startswith("diffusers.pipelines.")
    # What was cropped is pasted into the picture by the pipeline itself.
    return is_stock and not _REPLACEABLE & vars(processor).keys() and options.get("padding_mask_crop") is None


def pictures(images: Tensor) -> list[Image.Image]:
    """Pictures of values in [0, 1], ``[B, C, H, W]`` with one or three channels, as diffusers rounds them."""
    rounded = (images.detach().permute(0, 2, 3, 1).float() * 255).round().to(torch.uint8)
    arrays = rounded.contiguous().cpu().numpy()
    if arrays.shape[-1] == 1:
        arrays = arrays[..., 0]
    return [Image.fromarray(array) for array in arrays]
