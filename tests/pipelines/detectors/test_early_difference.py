"""The default detector, apart from any model: clear changes are local at once, doubtful ones are watched."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisedit_compiler.errors import ConfigError, MaskError
from fisedit_compiler.pipelines.detectors import DetectedMask, EarlyDifference


def latents(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(seed))


def moved(base: torch.Tensor, top: int, left: int, size: int, noise: float = 0.01) -> torch.Tensor:
    edited = base + noise * latents(1)
    edited[..., top : top + size, left : left + size] += 1.0
    return edited


@given(top=st.integers(0, 20), left=st.integers(0, 20), size=st.integers(5, 12))
def test_a_clear_square_is_found_after_one_step(top: int, left: int, size: int) -> None:
    detector = EarlyDifference()
    detector.update(moved(latents(), top, left, size), latents())
    found = detector.decide(last=False)
    assert found is not None and not found.everywhere
    assert found.mask[top : top + size, left : left + size].all()
    assert found.quiet is not None and found.quiet <= detector.clear
    grown = torch.zeros(32, 32, dtype=torch.bool)
    room = detector.dilation_radius + 2  # the smoothing moves the edge by a site or two
    grown[max(top - room, 0) : top + size + room, max(left - room, 0) : left + size + room] = True
    assert not (found.mask & ~grown).any()


def test_a_doubtful_change_is_watched_until_it_is_clear() -> None:
    detector = EarlyDifference()
    detector.update(moved(latents(), 4, 4, 10, noise=0.15), latents())
    assert detector.decide(last=False) is None
    detector.update(moved(latents(), 4, 4, 10), latents())
    found = detector.decide(last=False)
    assert found is not None and not found.everywhere
    assert detector.steps == 2


def test_only_the_latest_step_counts() -> None:
    detector = EarlyDifference()
    detector.update(moved(latents(), 0, 0, 8), latents())
    detector.update(moved(latents(), 20, 20, 8), latents())
    found = detector.decide(last=True)
    assert found is not None
    assert found.mask[20:28, 20:28].all() and not found.mask[:8, :8].any()


def test_a_change_everywhere_is_said_after_the_last_step_only() -> None:
    detector = EarlyDifference()
    detector.update(latents() + latents(2), latents())
    assert detector.decide(last=False) is None
    found = detector.decide(last=True)
    assert found is not None and found.everywhere and found.mask.all()
    assert found.quiet is not None and found.quiet > detector.everywhere_ratio
    local = EarlyDifference(everywhere_ratio=1.0)
    local.update(latents() + latents(2), latents())
    found = local.decide(last=True)
    assert found is not None and not found.everywhere


def test_steps_that_get_less_clear_do_not_make_a_local_change_one_everywhere() -> None:
    """A new object moves its surroundings in later steps; a new background differs everywhere from the first on."""

    def watched(*noises: float) -> DetectedMask:
        detector = EarlyDifference()
        for noise in noises:
            detector.update(moved(latents(), 4, 4, 10, noise=noise), latents())
            assert detector.decide(last=False) is None
        found = detector.decide(last=True)
        assert found is not None
        return found

    assert watched(0.2).everywhere, "the latest step alone would say so"
    local, scene = watched(0.09, 0.09, 0.09, 0.2), watched(0.2, 0.2, 0.2, 0.09)
    assert (local.everywhere, scene.everywhere) == (False, True)
    rule = EarlyDifference()
    assert local.quiet is not None and rule.clear < local.quiet <= rule.everywhere_ratio
    assert scene.quiet is not None and scene.quiet > rule.everywhere_ratio


def test_equal_latents_are_an_empty_mask_at_once() -> None:
    detector = EarlyDifference()
    detector.update(latents(), latents())
    found = detector.decide(last=False)
    assert found is not None and not found.mask.any() and found.threshold is None


def test_rounding_is_no_change_but_may_become_one() -> None:
    detector = EarlyDifference()
    detector.update(latents() + 1e-6, latents())
    assert detector.decide(last=False) is None
    found = detector.decide(last=True)
    assert found is not None and not found.mask.any()


def test_a_difference_that_is_the_same_at_every_site_is_one_everywhere() -> None:
    detector = EarlyDifference()
    detector.update(latents() + 1.0, latents())
    found = detector.decide(last=True)
    assert found is not None and found.everywhere


def test_fresh_forgets_the_steps_and_keeps_the_settings() -> None:
    detector = EarlyDifference(dilation_radius=5, max_calls=2)
    detector.update(moved(latents(), 2, 2, 8), latents())
    assert detector.fresh() == EarlyDifference(dilation_radius=5, max_calls=2)
    assert detector.fresh().steps == 0


@pytest.mark.parametrize(
    "wrong", [{"opening_radius": -1}, {"smoothing": -1.0}, {"max_calls": 0}, {"clear": 2.0}, {"floor": -0.1}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="must"):
        EarlyDifference(**wrong)  # type: ignore[arg-type]


def test_errors_name_the_mistake() -> None:
    with pytest.raises(MaskError, match="at least one"):
        EarlyDifference().decide(last=True)
    with pytest.raises(MaskError, match="height and width"):
        EarlyDifference().update(latents(), latents()[..., :16])
    with pytest.raises(MaskError, match="NaN"):
        EarlyDifference().update(latents() * float("nan"), latents())
