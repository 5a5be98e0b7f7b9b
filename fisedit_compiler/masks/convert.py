"""From whatever the user has (tensor, array, image, file) to one boolean per latent site."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from PIL import Image

from fisedit_compiler import images
from fisedit_compiler.errors import MaskError
from fisedit_compiler.masks.painted import GREY_THRESHOLD, painted

MaskLike: TypeAlias = images.ImageLike
"""What a user may pass as a mask: a tensor, an array, an image, or the path of an image or ``.npy`` file."""

_THRESHOLD = 0.5


def to_site_mask(mask: MaskLike, height: int, width: int, *, image_scale: int | None = None) -> torch.Tensor:
    """Convert ``mask`` to a boolean mask of latent sites; true marks a site to compute again.

    A mask of the image's size is reduced by *any*: a site is active as soon as one pixel under it is. Nothing
    is ever resized silently, since a mask of a foreign size is more often a mix-up than a wish.

    Args:
        mask: ``[H, W]``, ``[1, H, W]`` or ``[1, 1, H, W]`` of bool, uint8 (0 and 1, or grey 0 to 255, active
            from 128) or float in [0, 1] (active above 0.5); a PIL image, turned by its EXIF orientation (what is active
            in it: :func:`~fisedit_compiler.masks.painted.painted`); or the path of an image file or of an array that
            ``numpy.save`` wrote (``.npy``).
        height: rows of the latent.
        width: columns of the latent.
        image_scale: image pixels per latent site along one axis (the VAE's factor: 8 for Stable Diffusion).
            Without it a mask of any whole multiple of the latent size is taken.

    Returns:
        A contiguous bool tensor ``[height, width]``, on the device of ``mask`` if that was a tensor, else on
        the CPU.

    Raises:
        MaskError: wrong type, dtype, number of dimensions, size, range, NaN, an image of which something is painted
            and nothing is active, or an unreadable file.
    """
    with images.naming(mask, images.MASK):
        pixels = mask_pixels(mask)
        factor = _pixels_per_site(pixels, height, width, image_scale)
    if factor == 1:
        return pixels.contiguous()
    return pixels.reshape(height, factor, width, factor).any(dim=3).any(dim=1)


def mask_pixels(mask: MaskLike) -> torch.Tensor:
    """The mask at its own size: a bool tensor ``[H, W]``; arguments and errors are those of :func:`to_site_mask`."""
    held = images.read(mask, images.MASK)
    with images.naming(mask, images.MASK):
        if isinstance(held, Image.Image):
            return torch.from_numpy(painted(held))
        if isinstance(held, np.ndarray):
            if held.dtype.kind != "f" and held.dtype not in (np.bool_, np.uint8):
                raise _wrong_dtype(held.dtype)
            held = torch.from_numpy(held)
        return _drop_leading_ones(_threshold(held))


def _threshold(values: torch.Tensor) -> torch.Tensor:
    if values.dtype == torch.bool:
        return values
    if values.dtype == torch.uint8:
        return _threshold_bytes(values)
    if not values.is_floating_point():
        raise _wrong_dtype(values.dtype)
    if bool(values.isnan().any()):
        raise MaskError("the mask contains NaN; every value must say active (1) or not (0)")
    if values.numel() and not (float(values.min()) >= 0.0 and float(values.max()) <= 1.0):
        raise MaskError(
            f"a float mask must lie in [0, 1], this one spans [{float(values.min()):g}, "
            f"{float(values.max()):g}]; scale it, or pass mask > threshold"
        )
    return values > _THRESHOLD


def _threshold_bytes(values: torch.Tensor) -> torch.Tensor:
    highest = int(values.max()) if values.numel() else 0
    if highest <= 1:
        return values != 0
    if highest < GREY_THRESHOLD:
        raise MaskError(
            f"a uint8 mask holds 0 and 1, or grey values with active pixels from {GREY_THRESHOLD}; the "
            f"highest value here is {highest}. For a map of labels pass labels == your_label"
        )
    return values >= GREY_THRESHOLD


def _wrong_dtype(dtype: object) -> MaskError:
    return MaskError(f"a mask must be bool, uint8 or float, not {dtype}; pass mask != 0 for a mask of integers")


def _drop_leading_ones(pixels: torch.Tensor) -> torch.Tensor:
    if not 2 <= pixels.ndim <= 4 or any(size != 1 for size in pixels.shape[:-2]):
        raise MaskError(
            f"a mask has the shape [H, W], [1, H, W] or [1, 1, H, W], not {list(pixels.shape)}; one mask "
            "serves the whole batch"
        )
    return pixels.reshape(pixels.shape[-2:])


def _pixels_per_site(pixels: torch.Tensor, height: int, width: int, image_scale: int | None) -> int:
    rows, columns = pixels.shape
    if (rows, columns) == (height, width):
        return 1
    if image_scale is not None:
        if (rows, columns) == (height * image_scale, width * image_scale):
            return image_scale
        image = f"{height * image_scale} x {width * image_scale} (the image)"
    else:
        if rows > 0 and rows % height == 0 and columns == rows // height * width:
            return rows // height
        image = "a whole multiple of it (the image)"
    raise MaskError(
        f"the mask is {rows} x {columns} (height x width), but this run takes {height} x {width} (the "
        f"latent) or {image}; resize the mask to one of them"
    )
