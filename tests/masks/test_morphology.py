"""Opening, dilation, growth, minimum area and the regions of a mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisedit_compiler import masks
from fisedit_compiler.errors import MaskError


@st.composite
def drawn(draw: st.DrawFn) -> torch.Tensor:
    height, width = draw(st.tuples(st.integers(1, 10), st.integers(1, 10)))
    bits = st.lists(st.booleans(), min_size=height * width, max_size=height * width)
    return torch.tensor(draw(bits)).reshape(height, width)


def flooded(mask: torch.Tensor, corners: bool) -> list[set[tuple[int, int]]]:
    """The connected regions of a mask by flooding: slow, and sharing nothing with the package."""
    left = {(row, column) for row, column in mask.nonzero().tolist()}
    found = []
    while left:
        region, front = set(), [left.pop()]
        while front:
            row, column = front.pop()
            region.add((row, column))
            for down in (-1, 0, 1):
                for right in (-1, 0, 1):
                    near = (row + down, column + right)
                    if near in left and (corners or 0 in (down, right)):
                        left.remove(near)
                        front.append(near)
        found.append(region)
    return found


def of(text: str) -> torch.Tensor:
    return torch.tensor([[sign == "#" for sign in line] for line in text.split()])


def test_opening_and_dilation() -> None:
    mask = torch.zeros(9, 9, dtype=torch.bool)
    mask[4, 4] = True
    assert masks.dilated(mask, 2).sum() == 13
    assert not masks.opened(mask, 1).any()
    assert torch.equal(masks.opened(masks.dilated(mask, 1), 1), masks.dilated(mask, 1))
    assert torch.equal(masks.dilated(mask, 0), mask)
    with pytest.raises(MaskError, match="radius"):
        masks.dilated(mask, -1)


@given(drawn(), st.integers(0, 3))
def test_opening_only_takes_dilation_only_gives(mask: torch.Tensor, radius: int) -> None:
    opened, dilated = masks.opened(mask, radius), masks.dilated(mask, radius)
    assert not (opened & ~mask).any()
    assert not (mask & ~dilated).any()
    assert not (dilated & ~masks.grown(mask, radius)).any()
    assert torch.equal(masks.opened(opened, radius), opened)


@given(drawn(), st.integers(0, 8))
def test_minimum_area_drops_exactly_the_small_regions(mask: torch.Tensor, sites: int) -> None:
    expected = torch.zeros_like(mask)
    for region in flooded(mask, corners=True):
        if len(region) >= sites:
            expected[tuple(zip(*region, strict=True))] = True
    assert torch.equal(masks.minimum_area(mask, sites, holes=0), expected)


@given(drawn(), st.integers(0, 8))
def test_minimum_area_fills_exactly_the_small_holes(mask: torch.Tensor, sites: int) -> None:
    height, width = mask.shape
    expected = mask.clone()
    for gap in flooded(~mask, corners=False):
        at_edge = any(row in (0, height - 1) or column in (0, width - 1) for row, column in gap)
        if len(gap) < sites and not at_edge:
            expected[tuple(zip(*gap, strict=True))] = True
    assert torch.equal(masks.minimum_area(mask, 0, holes=sites), expected)


@given(drawn(), st.integers(0, 8))
def test_minimum_area_twice_is_once(mask: torch.Tensor, sites: int) -> None:
    once = masks.minimum_area(mask, sites)
    assert torch.equal(masks.minimum_area(once, sites), once)


def test_minimum_area_on_a_drawing() -> None:
    before = of(".#..... .#..... ..#.... ....... .####.. .#..#.# .####.. .......")
    after = of("....... ....... ....... ....... .####.. .####.. .####.. .......")
    assert torch.equal(masks.minimum_area(before, 4), after)
    assert torch.equal(masks.minimum_area(before, 0), before)
    assert masks.minimum_area(before, 3)[2, 2]  # touching at a corner is touching
    with pytest.raises(MaskError, match="-1"):
        masks.minimum_area(before, -1)
    with pytest.raises(MaskError, match="-2"):
        masks.minimum_area(before, 3, holes=-2)


@given(drawn())
def test_regions_are_the_connected_ones(mask: torch.Tensor) -> None:
    found = masks.regions(mask)
    expected = flooded(mask, corners=True)
    assert sorted(region.sites for region in found) == sorted(map(len, expected))
    assert [region.sites for region in found] == sorted((region.sites for region in found), reverse=True)
    bounds = [
        ((min(rows), max(rows) + 1), (min(columns), max(columns) + 1))
        for rows, columns in (zip(*region, strict=True) for region in expected)
    ]
    assert sorted((region.rows, region.columns) for region in found) == sorted(bounds)


@given(drawn())
def test_a_regions_box_is_its_bounding_box(mask: torch.Tensor) -> None:
    for region in masks.regions(mask):
        expected = torch.zeros_like(mask)
        expected[slice(*region.rows), slice(*region.columns)] = True
        assert torch.equal(masks.box_mask(*mask.shape, region.box), expected)


def test_regions_as_text() -> None:
    large, small = masks.regions(of("#.... ...## ...##"))
    assert str(large) == "4 sites in rows 1-2, columns 3-4"
    assert str(small) == "1 site in rows 0-0, columns 0-0"


def test_a_small_picture_outside_the_mask_is_no_hole() -> None:
    before = of("... .#. ...")
    assert torch.equal(masks.minimum_area(before, 0, holes=1000), before)
