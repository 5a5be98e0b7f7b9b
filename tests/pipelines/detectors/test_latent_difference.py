"""The automatic mask's rule, apart from any model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisedit_compiler.errors import ConfigError, MaskError
from fisedit_compiler.pipelines.detectors import LatentDifference


def latents(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(seed))


def moved(base: torch.Tensor, top: int, left: int, size: int, by: float = 1.0) -> torch.Tensor:
    edited = base + 0.01 * latents(1)
    edited[..., top : top + size, left : left + size] += by
    return edited


@given(top=st.integers(0, 20), left=st.integers(0, 20), size=st.integers(4, 12))
def test_finds_the_square_that_moved(top: int, left: int, size: int) -> None:
    base = latents()
    difference = LatentDifference()
    for _ in range(3):
        difference.update(moved(base, top, left, size), base)
    found = difference.detect()
    assert found.mask[top + 1 : top + size - 1, left + 1 : left + size - 1].all()
    grown = torch.zeros(32, 32, dtype=torch.bool)
    grown[max(top - 2, 0) : top + size + 2, max(left - 2, 0) : left + size + 2] = True
    assert not (found.mask & ~grown).any()
    assert found.threshold is not None
    assert 0 < found.threshold < 3
    assert difference.steps == 3


def test_specks_are_opened_away() -> None:
    base = latents()
    difference = LatentDifference()
    edited = moved(base, 4, 4, 8)
    edited[..., 25, 25] += 1.0
    difference.update(edited, base)
    assert not difference.detect().mask[22:, 22:].any()


def test_every_step_weighs_the_same() -> None:
    base = latents()
    difference = LatentDifference()
    difference.update(moved(base, 2, 2, 8, by=0.2), base)
    difference.update(moved(base, 20, 20, 8, by=20.0), base)
    mask = difference.detect().mask
    assert mask[4:8, 4:8].all()
    assert mask[22:26, 22:26].all()


def test_without_a_quiet_background_the_whole_picture_changes() -> None:
    base = latents()
    edited = moved(base, 4, 4, 8)
    edited[..., 12:, :] += 0.5
    difference = LatentDifference()
    difference.update(edited, base)
    difference.update(base + latents(2), base)
    found = difference.detect()
    assert found.everywhere
    assert found.mask.all()
    local = LatentDifference(everywhere_ratio=1.0)
    local.update(edited, base)
    assert not local.detect().everywhere


def test_fresh_forgets_the_steps_and_keeps_the_settings() -> None:
    difference = LatentDifference(dilation_radius=5)
    difference.update(moved(latents(), 2, 2, 8), latents())
    assert difference.fresh() == LatentDifference(dilation_radius=5)
    assert difference.fresh().steps == 0


def test_no_difference_is_an_empty_mask() -> None:
    difference = LatentDifference()
    difference.update(latents(), latents())
    found = difference.detect()
    assert not found.mask.any()
    assert found.threshold is None


def test_errors_name_the_mistake() -> None:
    with pytest.raises(MaskError, match="at least one"):
        LatentDifference().detect()
    with pytest.raises(MaskError, match="height and width"):
        LatentDifference().update(latents(), latents()[..., :16])
    with pytest.raises(ConfigError, match="radii"):
        LatentDifference(opening_radius=-1)
    with pytest.raises(ConfigError, match="everywhere_ratio"):
        LatentDifference(everywhere_ratio=2.0)
    with pytest.raises(MaskError, match="NaN"):
        LatentDifference().update(latents() * float("nan"), latents())
