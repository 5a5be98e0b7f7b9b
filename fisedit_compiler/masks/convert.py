"""From whatever the user has (tensor, array, image, file) to one boolean per latent site."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from fisedit_compiler.errors import MaskError

MaskLike: TypeAlias = torch.Tensor | np.ndarray[Any, Any] | Image.Image | str | os.PathLike[str]
"""What a user may pass as a mask: a tensor, an array, an image, or the path of an image or ``.npy`` file."""

_THRESHOLD = 0.5
_GREY_THRESHOLD = 128


def to_site_mask(mask: MaskLike, height: int, width: int, *, image_scale: int | None = None) -> torch.Tensor:
    """Convert ``mask`` to a boolean mask of latent sites; true marks a site to compute again.

    A mask of the image's size is reduced by *any*: a site is active as soon as one pixel under it is. Nothing
    is ever resized silently, since a mask of a foreign size is more often a mix-up than a wish.

    Args:
        mask: ``[H, W]``, ``[1, H, W]`` or ``[1, 1, H, W]`` of bool, uint8 (0 and 1, or grey 0 to 255, active
            from 128) or float in [0, 1] (active above 0.5); a PIL image (active from grey 128; an alpha channel
            is taken only where it is opaque throughout); or the path of an image file or of an array that
            ``numpy.save`` wrote (``.npy``).
        height: rows of the latent.
        width: columns of the latent.
        image_scale: image pixels per latent site along one axis (the VAE's factor: 8 for Stable Diffusion).
            Without it a mask of any whole multiple of the latent size is taken.

    Returns:
        A contiguous bool tensor ``[height, width]``, on the device of ``mask`` if that was a tensor, else on
        the CPU.

    Raises:
        MaskError: wrong type, dtype, number of dimensions, size, range, NaN, or an unreadable file.
    """
    pixels = _threshold(_as_tensor(mask))
    pixels = _drop_leading_ones(pixels)
    factor = _pixels_per_site(pixels, height, width, image_scale)
    if factor == 1:
        return pixels.contiguous()
    return pixels.reshape(height, factor, width, factor).any(dim=3).any(dim=1)


def _as_tensor(mask: MaskLike) -> torch.Tensor:
    """The mask's values as a bool, uint8 or floating tensor, its dimensions untouched."""
    if isinstance(mask, torch.Tensor):
        return mask.detach()
    if isinstance(mask, (str, os.PathLike)):
        path = Path(mask)
        mask = _load_array(path) if path.suffix.lower() == ".npy" else _open(path)
    if isinstance(mask, Image.Image):
        return torch.from_numpy(_grey(mask))
    if isinstance(mask, np.ndarray):
        if mask.dtype != np.bool_ and mask.dtype != np.uint8 and not np.issubdtype(mask.dtype, np.floating):
            raise _wrong_dtype(mask.dtype)
        # The copy gives negative strides, foreign byte orders and read-only buffers a form torch accepts.
        native = mask.astype(np.float64) if np.issubdtype(mask.dtype, np.floating) else mask.copy()
        return torch.from_numpy(native)
    raise MaskError(
        f"a mask cannot be a {type(mask).__name__}; pass a torch tensor, a numpy array, a PIL image or the "
        "path of an image or .npy file"
    )


def _load_array(path: Path) -> np.ndarray[Any, Any]:
    try:
        # Never pickles: a mask file may come from anywhere.
        loaded: np.ndarray[Any, Any] = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise MaskError(f"there is no mask file {str(path)!r}; check the path") from error
    except (ValueError, EOFError, OSError) as error:
        raise MaskError(
            f"the mask file {str(path)!r} is not an array that numpy reads ({error}); write it by numpy.save as bool, "
            "uint8 or float"
        ) from error
    return loaded


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError as error:
        raise MaskError(f"there is no mask file {str(path)!r}; check the path") from error
    except (UnidentifiedImageError, OSError) as error:
        raise MaskError(
            f"the mask file {str(path)!r} is not an image that Pillow reads ({error}); save it as PNG"
        ) from error


def _grey(image: Image.Image) -> np.ndarray[Any, Any]:
    """Grey values 0 or 255 of an image; cut here so that a faint drawing is not taken for one of 0 and 1."""
    if "transparency" in image.info:
        image = image.convert("RGBA")
    if "A" in image.getbands() and image.getchannel("A").getextrema() == (255, 255):
        image = image.convert("RGB")  # opaque throughout, as many programs save any picture: the alpha says nothing
    if "A" in image.getbands():
        raise MaskError(
            f"the mask image has an alpha channel (mode {image.mode!r}), so it is unclear which pixels are "
            "active; pass image.convert('RGBA').getchannel('A') for the opaque ones or "
            "image.convert('RGB') to ignore the alpha"
        )
    if image.mode not in {"1", "L", "P", "RGB"}:
        raise MaskError(
            f"a mask image of mode {image.mode!r} is not supported; convert it to mode 'L', where white is active"
        )
    grey = np.asarray(image.convert("L"))
    return np.where(grey >= _GREY_THRESHOLD, 255, 0).astype(np.uint8)


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
    if highest < _GREY_THRESHOLD:
        raise MaskError(
            f"a uint8 mask holds 0 and 1, or grey values with active pixels from {_GREY_THRESHOLD}; the "
            f"highest value here is {highest}. For a map of labels pass labels == your_label"
        )
    return values >= _GREY_THRESHOLD


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
