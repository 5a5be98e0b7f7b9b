"""How alike two pictures are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage import metrics


def psnr(image: Image.Image, reference: Image.Image, pixels: NDArray[np.bool_] | None = None) -> float:
    """PSNR in dB of two pictures as RGB; infinite if they are equal.

    Args:
        image: a picture.
        reference: one of the same size.
        pixels: bool ``[height, width]``: compare these pixels only; NaN if there are none.
    """
    first, second = np.asarray(reference.convert("RGB")), np.asarray(image.convert("RGB"))
    if pixels is not None:
        first, second = first[pixels], second[pixels]
    if not first.size:
        return float("nan")
    if np.array_equal(first, second):
        return float("inf")
    return float(metrics.peak_signal_noise_ratio(first, second, data_range=255))
