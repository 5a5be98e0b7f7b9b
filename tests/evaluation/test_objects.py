"""Objects found on drawn pictures whose pixels are known."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from fisedit_compiler.evaluation.pairs.objects import changed_object, fit_backdrop, ground_truth, object_pixels
from fisedit_compiler.evaluation.pairs.pairs import EditPair

SIZE = 128
LEFT = (0.0, 0.0, 1.0, 0.5)


def backdrop(colour: tuple[int, int, int] = (60, 120, 200)) -> Image.Image:
    """A colour with a light gradient, as the embedded model's plain backgrounds are."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    light = 1.0 + 0.1 * (1 - y) - 0.05 * (x - 0.5) ** 2
    return Image.fromarray((light[..., None] * colour).clip(0, 255).astype(np.uint8))


def disc(image: Image.Image, centre: tuple[int, int], radius: int, colour: tuple[int, int, int]) -> np.ndarray:
    """Draw a disc at ``(x, y)``; returns its pixels."""
    pixels = Image.new("1", image.size)
    box = [centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius]
    ImageDraw.Draw(pixels).ellipse(box, fill=1)
    image.paste(colour, mask=pixels)
    return np.asarray(pixels)


def shadow(image: Image.Image, centre: tuple[int, int]) -> Image.Image:
    """A soft dark spot."""
    dark = Image.new("L", image.size, 255)
    ImageDraw.Draw(dark).ellipse([centre[0] - 20, centre[1] - 5, centre[0] + 20, centre[1] + 5], fill=140)
    light = np.asarray(dark.filter(ImageFilter.GaussianBlur(3)))[..., None] / 255
    return Image.fromarray((np.asarray(image) * light).astype(np.uint8))


def overlap(found: np.ndarray, wanted: np.ndarray) -> float:
    return float((found & wanted).sum() / (found | wanted).sum())


@pytest.mark.parametrize("colour", [(60, 120, 200), (20, 20, 24), (235, 235, 235), (200, 50, 40)])
def test_an_object_is_found_without_its_shadow(colour: tuple[int, int, int]) -> None:
    image = shadow(backdrop(colour), (30, 88))
    disc(image, (95, 60), 18, (250, 220, 40))
    wanted = disc(image, (30, 60), 20, (240, 130, 160))
    assert overlap(object_pixels(image, LEFT), wanted) > 0.93


def test_holes_belong_to_the_object() -> None:
    image = backdrop()
    wanted = disc(image, (30, 60), 20, (250, 220, 40))
    disc(image, (30, 60), 8, (60, 120, 200))
    assert overlap(object_pixels(image, LEFT), wanted) > 0.93


def test_the_fit_is_not_moved_by_an_object_at_the_border() -> None:
    image = backdrop()
    clean = np.asarray(image).astype(float)
    disc(image, (0, 64), 20, (250, 250, 250))
    assert np.abs(fit_backdrop(np.asarray(image).astype(float)) - clean).max() < 6


def test_a_plain_backdrop_has_no_object() -> None:
    assert not object_pixels(backdrop(), LEFT).any()


def test_the_truth_of_a_swap_is_the_union_of_both_objects() -> None:
    before, after = backdrop(), backdrop()
    wanted = disc(before, (30, 60), 20, (250, 220, 40)) | disc(after, (36, 70), 16, (220, 40, 40))
    pair = EditPair("a sun, blue background", "", "a rose, blue background", region=LEFT, kind="object")
    truth = ground_truth(pair, before, after)
    assert truth is not None and truth.source == "objects"
    assert overlap(truth.pixels, wanted) > 0.93
    assert truth.area == pytest.approx(wanted.mean(), rel=0.08)
    half = np.zeros((SIZE, SIZE), dtype=bool)
    half[:, :30] = True
    assert truth.recall(half) == pytest.approx((wanted & half).sum() / wanted.sum(), abs=0.05)
    assert truth.recall(~half & half) == 0.0


def test_in_a_scene_the_change_stands_for_the_object_without_lines_and_shadows() -> None:
    before, after = backdrop(), shadow(backdrop(), (30, 88))
    wanted = disc(before, (30, 60), 20, (250, 220, 40))
    ImageDraw.Draw(after).line([(0, 100), (128, 100)], fill=(255, 255, 255), width=1)
    assert overlap(changed_object(before, after, LEFT), wanted) > 0.9
    pair = EditPair("a sun, desert", "", "a rose, desert", region=LEFT, kind="object")
    truth = ground_truth(pair, before, after)
    assert truth is not None and truth.source == "difference"


def test_without_a_region_or_a_change_there_is_no_truth() -> None:
    image = backdrop()
    assert ground_truth(EditPair("a", "", "b"), image, image) is None
    assert ground_truth(EditPair("a", "", "b", region=LEFT), image, image) is None
