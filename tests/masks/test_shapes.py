"""Which sites are inside a box, an ellipse, a polygon and several of them; and shapes that are none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fisedit_compiler import masks
from fisedit_compiler.errors import MaskError

SIZES = st.tuples(st.integers(1, 12), st.integers(1, 12))
EIGHTHS = st.integers(0, 8).map(lambda number: number / 8)  # many of them fall on centres of sites
FRACTIONS = EIGHTHS | st.floats(0.0, 1.0)
POINTS = st.tuples(FRACTIONS, FRACTIONS)


@st.composite
def boxes(draw: st.DrawFn) -> masks.Box:
    top, bottom = sorted((draw(FRACTIONS), draw(FRACTIONS)))
    left, right = sorted((draw(FRACTIONS), draw(FRACTIONS)))
    return top, left, bottom, right


@st.composite
def pairs(draw: st.DrawFn, count: int = 2) -> list[torch.Tensor]:
    height, width = draw(SIZES)
    bits = st.lists(st.booleans(), min_size=height * width, max_size=height * width)
    return [torch.tensor(draw(bits)).reshape(height, width) for _ in range(count)]


def corners(box: masks.Box) -> list[tuple[float, float]]:
    top, left, bottom, right = box
    return [(top, left), (top, right), (bottom, right), (bottom, left)]


def test_box_and_ellipse() -> None:
    box = masks.box_mask(8, 16, (0.25, 0.5, 0.75, 1.0))
    assert box.nonzero().min(0).values.tolist() == [2, 8]
    assert box.nonzero().max(0).values.tolist() == [5, 15]
    assert masks.area(box) == 0.25
    ellipse = masks.ellipse_mask(64, 64, (0.0, 0.0, 1.0, 1.0))
    assert abs(masks.area(ellipse) - torch.pi / 4) < 0.01
    assert not masks.ellipse_mask(8, 8, (0.5, 0.5, 0.5, 0.5)).any()


@given(SIZES, boxes())
def test_a_site_is_in_a_box_if_its_centre_is(size: tuple[int, int], box: masks.Box) -> None:
    top, left, bottom, right = box
    mask = masks.box_mask(*size, box)
    for row, column in np.ndindex(size):
        y, x = (row + 0.5) / size[0], (column + 0.5) / size[1]
        assert bool(mask[row, column]) == (top <= y < bottom and left <= x < right)


@given(SIZES, boxes())
def test_the_polygon_of_a_boxs_corners_is_the_box(size: tuple[int, int], box: masks.Box) -> None:
    polygon = corners(box)
    assert torch.equal(masks.polygon_mask(*size, polygon), masks.box_mask(*size, box))
    assert torch.equal(masks.polygon_mask(*size, polygon[::-1]), masks.box_mask(*size, box))
    assert torch.equal(masks.polygon_mask(*size, np.array(polygon)), masks.box_mask(*size, box))


def test_a_triangle_site_by_site() -> None:
    triangle = masks.polygon_mask(4, 4, [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0)])  # below the diagonal
    # The centres on the diagonal lie on a right border: outside.
    assert torch.equal(triangle, torch.ones(4, 4).tril(-1).bool())
    other = masks.polygon_mask(4, 4, [(0.0, 0.0), (0.0, 1.0), (1.0, 1.0)])  # on a left border: inside
    assert torch.equal(other, ~triangle)


@given(SIZES, st.lists(POINTS, min_size=4, max_size=7))
def test_a_polygon_cut_along_a_line_is_shared_out(size: tuple[int, int], points: list[tuple[float, float]]) -> None:
    """Even-odd: the two parts of a polygon cut from its first to its third corner add up to it, site by site."""
    whole = masks.polygon_mask(*size, points)
    part, rest = masks.polygon_mask(*size, points[:3]), masks.polygon_mask(*size, [points[0], *points[2:]])
    assert torch.equal(part ^ rest, whole)


def test_what_a_line_goes_around_twice_is_outside() -> None:
    bow_tie = masks.polygon_mask(8, 8, [(0.0, 0.0), (1.0, 1.0), (0.0, 1.0), (1.0, 0.0)])
    assert bow_tie[4, 0] and bow_tie[4, 7]
    assert not bow_tie[0, 4] and not bow_tie[7, 4]
    twice = corners((0.0, 0.0, 1.0, 1.0)) * 2
    assert not masks.polygon_mask(4, 4, twice).any()


@given(SIZES, boxes(), boxes(), st.lists(POINTS, min_size=3, max_size=5))
def test_several_regions_are_their_union(
    size: tuple[int, int], first: masks.Box, second: masks.Box, polygon: list[tuple[float, float]]
) -> None:
    drawn = masks.ellipse_mask(*size, first)
    expected = masks.box_mask(*size, first) | masks.box_mask(*size, second) | masks.polygon_mask(*size, polygon) | drawn
    assert torch.equal(masks.regions_mask(*size, [first, second, polygon, drawn]), expected)
    assert torch.equal(masks.regions_mask(*size, [polygon, drawn.numpy(), list(second), first]), expected)


def test_regions_take_masks_of_the_images_size_and_may_be_none() -> None:
    pixels = Image.fromarray(np.eye(4, dtype=np.uint8).repeat(8, 0).repeat(8, 1) * 255)
    assert torch.equal(masks.regions_mask(4, 4, [pixels]), torch.eye(4).bool())
    assert not masks.regions_mask(4, 4, []).any()


@given(pairs(3))
def test_union_and_intersection_are_those_of_sets(three: list[torch.Tensor]) -> None:
    a, b, c = three
    nothing, everything = torch.zeros_like(a), torch.ones_like(a)
    union, intersection = masks.union, masks.intersection
    for operation, neutral, other in ((union, nothing, intersection), (intersection, everything, union)):
        assert torch.equal(operation(a, b), operation(b, a))
        assert torch.equal(operation(operation(a, b), c), operation(a, b, c))
        assert torch.equal(operation(a, neutral), a)
        assert torch.equal(operation(a, other(a, b)), a)
        assert torch.equal(operation(a, other(b, c)), other(operation(a, b), operation(a, c)))
        assert torch.equal(~operation(a, b), other(~a, ~b))


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((0.5, 0.0, 0.25, 1.0), "0 <= top <= bottom <= 1"),
        ((0.0, 0.0, 1.5, 1.0), "divide pixel positions"),
        ((0.0, float("nan"), 1.0, 1.0), "divide pixel positions"),
        ((32, 0, 256, 512), r"\(32 / height, 0 / width, 256 / height, 512 / width\)"),
        ((0.0, 0.0, 1.0), r"four fractions of the picture, not \(0\.0, 0\.0, 1\.0\)"),
        ("left", "four fractions of the picture, not 'left'"),
        (0.5, "four fractions"),
        ((0.0, 0.0, "1", 1.0), "four fractions"),
        ((False, False, True, True), "four fractions"),
    ],
)
def test_boxes_that_are_none(box: Any, message: str) -> None:
    for shape in (masks.box_mask, masks.ellipse_mask):
        with pytest.raises(MaskError, match=message):
            shape(8, 8, box)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "three or more points"),
        ([(0.0, 0.0), (1.0, 1.0)], "three or more points"),
        (7, "three or more points"),
        ([(0.0, 0.0), (1.0, 1.0), (0.5, 1.25)], r"point \(0\.5, 1\.25\).*divide pixel positions"),
        ([(0.0, 0.0), (1.0, 1.0), (-0.1, 0.5)], r"point \(-0\.1, 0\.5\)"),
        ([(0, 0), (0, 512), (256, 0)], r"\(0 / height, 512 / width\)"),
        ([(0.0, 0.0), (1.0, 1.0), (float("nan"), 0.5)], "point"),
        ([(0.0, 0.0), (1.0, 1.0), (0.5,)], r"point is \(y, x\)"),
        ([(0.0, 0.0), (1.0, 1.0), 0.5], r"point is \(y, x\)"),
        ([(0.0, 0.0), (1.0, 1.0), "ab"], r"point is \(y, x\)"),
    ],
)
def test_polygons_that_are_none(points: Any, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        masks.polygon_mask(8, 8, points)


def test_a_wrong_region_is_named_by_its_number() -> None:
    good = (0.0, 0.0, 0.5, 0.5)
    for wrong in ((0, 0, 64, 64), [(0.0, 0.0), (1.0, 1.0)], torch.ones(3, 3), "no-such-file.png", None):
        with pytest.raises(MaskError, match=r"^region 1: "):
            masks.regions_mask(8, 8, [good, wrong])


def test_masks_that_cannot_be_combined() -> None:
    mask = torch.ones(4, 4, dtype=torch.bool)
    with pytest.raises(MaskError, match="no mask"):
        masks.union()
    with pytest.raises(MaskError, match=r"\[4, 4\] and \[4, 5\]"):
        masks.intersection(mask, torch.ones(4, 5, dtype=torch.bool))
    for other in (mask.float(), mask.numpy(), mask[None]):
        with pytest.raises(MaskError, match="to_site_mask"):
            masks.union(mask, other)
