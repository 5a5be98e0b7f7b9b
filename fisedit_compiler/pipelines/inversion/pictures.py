"""Reading the user's picture: from whatever it is to RGB of a size the model takes, and from there to latents.

Every function answers or raises an error with the remedy; only :func:`encoded` runs a model, the VAE's encoder.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from fisedit_compiler import images
from fisedit_compiler.errors import ConfigError, PictureError
from fisedit_compiler.images import ImageLike

_PIPELINE_MULTIPLE = 8  # diffusers refuses other sizes, whatever the VAE's factor is
_MAX_ASPECT = 8.0


def read_picture(image: ImageLike) -> Image.Image:
    """An RGB picture, 8 bits a channel, upright (the EXIF orientation is applied).

    Args:
        image: a PIL image of 8-bit channels; the path of an image or ``.npy`` file; a numpy array
            ``[height, width]`` or ``[height, width, C]`` with 1, 3 or 4 channels, uint8 or float in [0, 1]; a torch
            tensor ``[C, height, width]`` or ``[1, C, height, width]``, likewise. Grey becomes RGB; an alpha channel
            must be opaque. Floats are rounded to 8 bits.

    Raises:
        PictureError: an unreadable or animated file, another type, shape or mode, more than 8192 x 8192 pixels,
            transparency, values out of range, NaN.
    """
    held = images.read(image, images.PICTURE)
    with images.naming(image, images.PICTURE):
        if isinstance(held, torch.Tensor):
            held = _from_values(_tensor_values(held))
        elif isinstance(held, np.ndarray):
            held = _from_values(_array_values(held))
        flat = images.opaque(held, images.PICTURE)
        if flat is None:
            raise PictureError(
                "the picture has transparent pixels, and the model knows none; put it on a background first, e.g. "
                'Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))'
            )
        return flat.convert("RGB")


def size_unit(pipe: Any) -> int:
    """The number of pixels that height and width must be multiples of."""
    blocks = getattr(pipe.unet.config, "block_out_channels", ())
    return math.lcm(_PIPELINE_MULTIPLE, int(pipe.vae_scale_factor) * 2 ** max(len(blocks) - 1, 0))


def fit(picture: Image.Image, unit: int, model_pixels: int, *, resize: bool) -> Image.Image:
    """The picture at a size the model takes.

    Args:
        picture: RGB.
        unit: what both edges must be multiples of.
        model_pixels: pixels of the pictures the model was trained on.
        resize: bring another size to about ``model_pixels``, its shape kept as nearly as ``unit`` allows: scaled by
            LANCZOS to cover the new size, the rest cut off evenly. A picture of a fitting size that is not larger than
            that is left alone.

    Raises:
        PictureError: the size does not fit and ``resize`` is off; names the nearest sizes that do.
    """
    width, height = picture.size
    fits = width % unit == 0 and height % unit == 0
    if fits and (not resize or width * height <= model_pixels):
        return picture
    if not resize:
        lower = tuple(max(edge // unit, 1) * unit for edge in (width, height))
        upper = tuple(-(-edge // unit) * unit for edge in (width, height))
        sizes = " or ".join(f"{w} x {h}" for w, h in dict.fromkeys((lower, upper)))
        raise PictureError(
            f"the picture is {width} x {height} pixels (width x height) and the model takes multiples of {unit}: the "
            f"nearest are {sizes}. Crop or scale it, or pass resize=True"
        )
    shape = min(max(width / height, 1 / _MAX_ASPECT), _MAX_ASPECT)
    edges = (math.sqrt(model_pixels * shape), math.sqrt(model_pixels / shape))
    target = tuple(max(round(edge / unit), 1) * unit for edge in edges)
    return ImageOps.fit(picture, (target[0], target[1]), Image.Resampling.LANCZOS)


def check_encoder(pipe: Any) -> None:
    """Refuse a pipeline that cannot encode pictures.

    Raises:
        ConfigError: it has no VAE, or one without an encoder.
    """
    vae = getattr(pipe, "vae", None)
    if not callable(getattr(vae, "encode", None)) or getattr(vae, "encoder", None) is None:
        raise ConfigError(
            f"{type(pipe).__name__} has no VAE with an encoder, so it cannot load a picture; give the pipeline a whole "
            "AutoencoderKL"
        )


@torch.no_grad()
def encoded(pipe: Any, picture: Image.Image) -> torch.Tensor:
    """The VAE's mean latents ``[1, C, H, W]`` of an RGB picture, scaled as the UNet wants them, in the UNet's dtype.

    Raises:
        PictureError: the encoder gives NaN or infinity, in float32, too.
    """
    vae = pipe.vae
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].to(pipe._execution_device)
    latents = _means(vae, pixels)
    if not bool(latents.isfinite().all()) and vae.dtype != torch.float32:
        # Some encoders leave the range of half precision; diffusers' own pipelines widen them for the moment, too.
        dtype = vae.dtype
        vae.to(torch.float32)
        try:
            latents = _means(vae, pixels)
        finally:
            vae.to(dtype)
    if not bool(latents.isfinite().all()):
        raise PictureError("the VAE encodes the picture to NaN or infinity; check the VAE's weights and dtype")
    return latents.to(pipe.unet.dtype)


def _means(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    output = vae.encode(pixels.to(vae.dtype) / 127.5 - 1.0)
    means: torch.Tensor = output.latents if hasattr(output, "latents") else output.latent_dist.mode()
    config = vae.config
    if getattr(config, "latents_mean", None) is not None and getattr(config, "latents_std", None) is not None:
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1).to(means) for values in (config.latents_mean, config.latents_std)
        )
        return (means - mean) * config.scaling_factor / std
    return means * config.scaling_factor


def _tensor_values(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    values = tensor.detach().cpu()
    if values.ndim == 4 and values.shape[0] == 1:
        values = values[0]
    if values.ndim != 3 or values.shape[0] not in (1, 3, 4):
        raise PictureError(
            f"a tensor of shape {list(tensor.shape)} is no picture; pass [3, height, width] or [1, 3, height, width]"
        )
    if values.dtype == torch.uint8:
        return values.permute(1, 2, 0).numpy()
    if not values.is_floating_point():
        raise PictureError(f"a picture cannot have dtype {tensor.dtype}; pass uint8 in 0..255 or floats in [0, 1]")
    return values.permute(1, 2, 0).to(torch.float64).numpy()


def _array_values(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    values = array[..., None] if array.ndim == 2 else array
    if values.ndim != 3 or values.shape[-1] not in (1, 3, 4):
        raise PictureError(f"an array of shape {list(array.shape)} is no picture; pass [height, width, 3]")
    if values.dtype != np.uint8 and not np.issubdtype(values.dtype, np.floating):
        raise PictureError(f"a picture cannot have dtype {array.dtype}; pass uint8 in 0..255 or floats in [0, 1]")
    return values


def _from_values(values: np.ndarray[Any, Any]) -> Image.Image:
    """An image of ``[height, width, channels]``, uint8 or float."""
    if values.size == 0:
        raise PictureError(f"the picture is empty: shape {list(values.shape)}")
    if values.dtype != np.uint8:
        if not np.isfinite(values).all():
            raise PictureError("the picture holds NaN or infinity")
        if values.min() < 0.0 or values.max() > 1.0:
            raise PictureError(
                f"the picture's values go from {values.min():.3g} to {values.max():.3g}; floats must be in [0, 1] "
                "(from [-1, 1]: (x + 1) / 2), and 0..255 must be uint8"
            )
        values = np.rint(values * 255.0).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(values[..., 0] if values.shape[-1] == 1 else values))
