"""The weights of a soft border: nothing outside, everything deep inside, rising between."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisedit_compiler import masks
from fisedit_compiler.errors import ConfigError


@st.composite
def drawn(draw: st.DrawFn) -> torch.Tensor:
    height, width = draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    # Mostly active, so that there are sites deep inside.
    bits = st.lists(st.integers(0, 19).map(bool), min_size=height * width, max_size=height * width)
    return torch.tensor(draw(bits)).reshape(height, width)


@given(drawn(), st.integers(0, 4))
def test_weights_of_every_site(mask: torch.Tensor, sites: int) -> None:
    weights = masks.feather_weights(mask, sites)
    assert weights.dtype == torch.float32
    outside = (~mask).nonzero().tolist()
    for (row, column), weight in zip(
        torch.cartesian_prod(*map(torch.arange, mask.shape)), weights.ravel(), strict=True
    ):
        distances = [math.hypot(int(row) - y, int(column) - x) for y, x in outside]
        expected = min(1.0, min(distances, default=math.inf) / (sites + 1)) if sites else float(mask[row, column])
        assert float(weight) == pytest.approx(expected)
    assert (weights[~mask] == 0).all() and (weights[mask] > 0).all()


@given(drawn(), st.integers(1, 4))
def test_a_wider_feather_takes_more_and_a_larger_mask_gives_more(mask: torch.Tensor, sites: int) -> None:
    weights = masks.feather_weights(mask, sites)
    assert (masks.feather_weights(mask, sites + 1) <= weights).all()
    assert (masks.feather_weights(masks.grown(mask, 1), sites) >= weights).all()


def test_a_straight_border_and_the_pictures_edge() -> None:
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[:, 2:] = True
    ramp = torch.tensor([0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0])
    assert torch.equal(masks.feather_weights(mask, 3), ramp.expand(3, 8))
    assert (masks.feather_weights(torch.ones(3, 8, dtype=torch.bool), 3) == 1).all()
    assert (masks.feather_weights(torch.zeros(3, 8, dtype=torch.bool), 3) == 0).all()


@given(drawn(), st.integers(1, 4), st.integers(1, 50))
def test_per_step_the_ramp_is_steeper_and_its_ends_stay(mask: torch.Tensor, sites: int, steps: int) -> None:
    weights = masks.feather_weights(mask, sites)
    each = masks.weights_per_step(weights, steps)
    assert ((each == 0) == (weights == 0)).all() and ((each == 1) == (weights == 1)).all()
    # Powers of equal numbers differ by a rounding, according to where in a tensor they stand.
    assert (each >= weights - 1e-6).all() and (masks.weights_per_step(weights, steps + 1) >= each - 1e-6).all()
    assert (each.ravel()[weights.ravel().argsort()].diff() >= -1e-6).all()
    assert torch.equal(masks.weights_per_step(weights, 1), weights)


@pytest.mark.parametrize("sites", [-1, 1.5, True, "2", None])
def test_widths_that_are_none(sites: object) -> None:
    with pytest.raises(ConfigError, match="feather="):
        masks.feather_weights(torch.ones(3, 3, dtype=torch.bool), sites)
