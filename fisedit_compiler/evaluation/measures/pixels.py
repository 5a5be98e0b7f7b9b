"""What an edit changed that it should have left alone, in pixels.

"Outside" is the same set of pixels for every method of a pair. Measures whose windows reach over its edge see the base
inside, so that only what lies outside counts.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from skimage import metrics

from fisedit_compiler.pipelines.drawing.pictures import mask_to_pixels
from fisedit_compiler.pipelines.likeness import psnr

Pixels = NDArray[np.bool_]

EQUAL_DB = 100.0
"""PSNR that stands for pictures without a difference, so that means stay finite."""


def outside_mask(mask: torch.Tensor, image: Image.Image) -> Pixels:
    """The pixels of ``image`` that no active site of ``mask`` (bool ``[H, W]``, latent sites) covers."""
    return ~mask_to_pixels(mask, image)


def finite_psnr(image: Image.Image, base: Image.Image, pixels: Pixels) -> float | None:
    """PSNR in dB over ``pixels``, at most :data:`EQUAL_DB`; ``None`` if there are none."""
    value = psnr(image, base, pixels)
    return None if math.isnan(value) else min(value, EQUAL_DB)


def ssim(image: Image.Image, base: Image.Image, pixels: Pixels) -> float | None:
    """Mean structural similarity (Wang et al., 2004) over ``pixels``, in [-1, 1]; ``None`` if there are none."""
    if not pixels.any():
        return None
    kept = np.asarray(with_base_inside(image, base, pixels))
    _, similarity = metrics.structural_similarity(
        np.asarray(base.convert("RGB")), kept, channel_axis=2, data_range=255, full=True
    )
    return float(similarity[pixels].mean())


def with_base_inside(image: Image.Image, base: Image.Image, outside: Pixels) -> Image.Image:
    """``image`` on the pixels of ``outside``, ``base`` elsewhere."""
    edited, original = np.asarray(image.convert("RGB")), np.asarray(base.convert("RGB"))
    return Image.fromarray(np.where(outside[..., None], edited, original))
