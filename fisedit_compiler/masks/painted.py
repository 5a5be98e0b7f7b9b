"""Which pixels of a drawn mask are active: white on black, and no guess where it is something else."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageChops

from fisedit_compiler import images
from fisedit_compiler.errors import MaskError

GREY_THRESHOLD = 128
"""Grey values from here, of 0 to 255, are active."""

_DEEP_THRESHOLD = 2**15  # the same of 16 bits
_COLOUR = 128  # between the brightest and the darkest channel: more than JPEG makes of black and white
_REMEDY = "paint what may change in white (255) on black (0)"


def painted(image: Image.Image) -> np.ndarray[Any, Any]:
    """The active pixels of a mask image.

    A pixel is active if its grey value (ITU-R 601 luma) is at least 128 of 255, in 16 bits 32768 of 65535. If no
    channel of the whole image is above 1, it is taken for one of zeros and ones, and the ones are active.

    Args:
        image: decoded and upright, of any mode.

    Returns:
        bool ``[height, width]``; nothing is active in an image that is black throughout.

    Raises:
        MaskError: something is painted and nothing is active; strong colours that are too dark to be active, which may
            mean either; transparent pixels; a mode whose range is not known.
    """
    if image.mode.startswith("I;16") and "transparency" not in image.info:
        return _active(np.asarray(image), _DEEP_THRESHOLD)
    flat = images.opaque(image, images.MASK)
    if flat is None:
        raise MaskError(
            f"the mask image has an alpha channel (mode {image.mode!r}), so it is unclear which pixels are "
            "active; pass image.convert('RGBA').getchannel('A') for the opaque ones or "
            "image.convert('RGB') to ignore the alpha"
        )
    if flat.mode == "L":
        return _active(np.asarray(flat), GREY_THRESHOLD)
    red, green, blue = flat.split()
    brightest = np.asarray(ImageChops.lighter(ImageChops.lighter(red, green), blue))
    if brightest.max() <= 1:
        return brightest > 0
    darkest = np.asarray(ImageChops.darker(ImageChops.darker(red, green), blue))
    grey = np.asarray(flat.convert("L"))
    unclear = (grey < GREY_THRESHOLD) & (brightest - darkest >= _COLOUR)
    if unclear.any():
        row, column = np.argwhere(unclear)[0].tolist()
        colour = flat.getpixel((column, row))
        raise MaskError(
            f"the mask image has strong colours that are too dark to count, such as {colour} at row {row}, column "
            f"{column} (grey {grey[row, column]}, active from {GREY_THRESHOLD}), so it is unclear whether they are "
            f"active; {_REMEDY}, or pass np.asarray(image.convert('RGB')).max(2) > 127 to count every bright colour"
        )
    return _active(grey, GREY_THRESHOLD, brightest)


def _active(
    grey: np.ndarray[Any, Any], threshold: int, brightest: np.ndarray[Any, Any] | None = None
) -> np.ndarray[Any, Any]:
    """Grey values from ``threshold``, or the ones of zeros and ones; ``brightest`` tells what is painted at all."""
    highest = int(grey.max() if brightest is None else brightest.max())
    if highest <= 1:
        return grey > 0
    active: np.ndarray[Any, Any] = grey >= threshold
    if not active.any():
        raise MaskError(
            f"something is painted in the mask image but nothing counts: its highest value is {highest}, and pixels "
            f"are active from {threshold} (or 1 in an image of 0 and 1); {_REMEDY}, or pass "
            "np.asarray(image) > your_limit"
        )
    return active
