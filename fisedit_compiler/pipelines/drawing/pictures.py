"""Pictures of edits: the mask over an image, a sheet of captioned pictures.

Drawing only, by Pillow; nothing here runs a model or measures. Plots by matplotlib are made in ``drawing.figures``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from skimage import segmentation

_PADDING = 8
_CAPTION_LINES = 2
_FONT_SIZE = 13
_CONTOUR = (255, 64, 64)


def mask_to_pixels(mask: torch.Tensor, image: Image.Image) -> np.ndarray:
    """A bool ``[H, W]`` mask of latent sites blown up to the image's pixels, ``[height, width]``."""
    small = Image.fromarray(mask.cpu().numpy().astype(np.uint8) * 255)
    return np.asarray(small.resize(image.size, Image.Resampling.NEAREST)) > 0


def mask_overlay(image: Image.Image, mask: torch.Tensor, *, dim: float = 0.35) -> Image.Image:
    """The image with everything outside the mask greyed and darkened to ``dim``, and a line around it."""
    active = mask_to_pixels(mask, image)
    pixels = np.asarray(image.convert("RGB")).astype(np.float32)
    grey = pixels.mean(axis=2, keepdims=True)
    drawn = np.where(active[..., None], pixels, dim * (0.5 * pixels + 0.5 * grey)).round().astype(np.uint8)
    drawn[segmentation.find_boundaries(active, mode="inner")] = _CONTOUR
    return Image.fromarray(drawn)


def contact_sheet(
    rows: Sequence[Sequence[tuple[Image.Image, str]]], *, columns: Sequence[str] = (), size: int = 256
) -> Image.Image:
    """A sheet of captioned pictures.

    Args:
        rows: the pictures of each row with their captions; long captions are wrapped and cut after two lines.
        columns: titles above the columns.
        size: edge of a picture on the sheet in pixels.
    """
    font = ImageFont.load_default(_FONT_SIZE)
    line = _FONT_SIZE + 3
    cell_width, cell_height = size + _PADDING, size + _CAPTION_LINES * line + _PADDING
    header = line + _PADDING if columns else _PADDING
    count = max((len(row) for row in rows), default=0)
    sheet = Image.new("RGB", (count * cell_width + _PADDING, header + len(rows) * cell_height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, title in enumerate(columns):
        draw.text((_PADDING + index * cell_width, _PADDING // 2), title, fill="black", font=font)
    for row_index, row in enumerate(rows):
        for column_index, (image, caption) in enumerate(row):
            x, y = _PADDING + column_index * cell_width, header + row_index * cell_height
            sheet.paste(image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS), (x, y))
            text = "\n".join(_wrapped(caption, font, size))
            draw.multiline_text((x, y + size + 2), text, fill="black", font=font, spacing=2)
    return sheet


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines of whole words no wider than ``width`` pixels; dots at the end stand for words left over."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] = f"{lines[-1]} {word}"
        elif len(lines) < _CAPTION_LINES:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1].rstrip(',.')}..."
            break
    return lines
