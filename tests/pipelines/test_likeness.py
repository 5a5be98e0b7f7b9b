"""PSNR against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fisedit_compiler.pipelines.likeness import psnr


def test_psnr() -> None:
    black, grey = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), (51, 51, 51))
    everywhere = np.ones((4, 4), dtype=bool)
    assert psnr(black, black) == psnr(black, black, everywhere) == float("inf")
    assert psnr(black, grey) == psnr(black, grey, everywhere) == pytest.approx(20 * np.log10(5))
    assert np.isnan(psnr(black, grey, ~everywhere))


def test_psnr_of_some_pixels() -> None:
    black, half = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4))
    half.paste((51, 51, 51), (0, 0, 2, 4))
    left = np.zeros((4, 4), dtype=bool)
    left[:, :2] = True
    assert psnr(half, black, left) == pytest.approx(20 * np.log10(5))
    assert psnr(half, black, ~left) == float("inf")
