"""Overlays and sheets have the right sizes and darken the right pixels."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from fisedit_compiler.pipelines.drawing.pictures import contact_sheet, mask_overlay, mask_to_pixels


def picture() -> Image.Image:
    return Image.new("RGB", (64, 64), (200, 100, 50))


def test_overlay_keeps_the_mask_and_darkens_the_rest() -> None:
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[4:12, 4:12] = True
    drawn = np.asarray(mask_overlay(picture(), mask))
    assert (drawn[20:44, 20:44] == (200, 100, 50)).all()
    assert (drawn[:15, :15] < 100).all()
    assert mask_to_pixels(mask, picture()).sum() == 32 * 32


def test_sheet_holds_every_cell() -> None:
    long = "a very long caption " * 10
    rows = [[(picture(), "one"), (picture(), long)], [(picture(), "")]]
    sheet = contact_sheet(rows, columns=("a", "b"), size=64)
    assert sheet.width == 2 * 72 + 8
    pixels = np.asarray(sheet)
    assert (pixels == (200, 100, 50)).all(axis=-1).sum() == 3 * 64 * 64
