"""Outside the mask the base's pixels, inside the decoder's, and between them a blend inside the mask."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fisedit_compiler.pipelines.drawing.seam import pasted

BLACK, WHITE = Image.new("RGB", (64, 64), "black"), Image.new("RGB", (64, 64), "white")


def mask_of(top: int, left: int, bottom: int, right: int) -> torch.Tensor:
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


@given(top=st.integers(0, 12), left=st.integers(0, 12), size=st.integers(1, 16))
def test_outside_nothing_changes_and_inside_the_share_only_grows(top: int, left: int, size: int) -> None:
    mask = mask_of(top, left, top + size, left + size)
    share = np.asarray(pasted(WHITE, BLACK, mask))[..., 0]
    inside = mask.numpy().repeat(4, 0).repeat(4, 1)
    assert (share[~inside] == 0).all()
    assert (share[inside] > 0).all()


def test_one_site_from_the_border_the_decoder_is_whole() -> None:
    share = np.asarray(pasted(WHITE, BLACK, mask_of(4, 0, 12, 8)))[..., 0]
    assert (share[20:44, :28] == 255).all()  # the picture's own border is none of the mask
    assert list(share[32, 28:34]) == [223, 159, 96, 32, 0, 0]


def test_a_full_mask_is_the_decoders_picture() -> None:
    assert pasted(WHITE, BLACK, mask_of(0, 0, 16, 16)) is WHITE


def test_equal_pixels_stay_equal() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(pasted(noise, noise, mask_of(2, 3, 9, 11))), np.asarray(noise))
