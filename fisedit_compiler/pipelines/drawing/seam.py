"""Bringing the user's own pixels back around an edit of a loaded picture.

A decoder does not give a picture back that an encoder was given, not even where the latents did not change. So
outside the mask an edit takes the pixels of its base, and inside, near the mask's border, a blend.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from fisedit_compiler.pipelines.drawing.pictures import mask_to_pixels


def pasted(decoded: Image.Image, base: Image.Image, mask: torch.Tensor) -> Image.Image:
    """``base`` with ``decoded`` inside the mask.

    Outside the mask every pixel is the base's. Inside, the share of ``decoded`` grows with the distance from the
    mask's border and is whole from one latent site on; the picture's own border is no border of the mask.

    Args:
        decoded: RGB, what the decoder made.
        base: RGB of the same size.
        mask: bool ``[H, W]`` at the latent's size.
    """
    inside = mask_to_pixels(mask, base)
    if inside.all():
        return decoded
    width = base.height // mask.shape[0]
    # The outermost pixel inside is at distance 1 from the pixel outside, half of it from the border itself.
    share = np.clip((ndimage.distance_transform_edt(inside) - 0.5) / width, 0.0, 1.0)[..., None]
    new, old = (np.asarray(picture.convert("RGB")) for picture in (decoded, base))
    blend = np.rint(share * new + (1.0 - share) * old).astype(np.uint8)
    return Image.fromarray(np.where(inside[..., None], blend, old))
