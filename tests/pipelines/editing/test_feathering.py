"""A soft border blends the latents inside the mask, and outside nothing moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

from fisedit_compiler import masks
from fisedit_compiler.errors import ConfigError
from fisedit_compiler.pipelines import Edit, Editor, Generation, LatentDifference
from fisedit_compiler.pipelines.editing.steps import FollowBase
from fisedit_compiler.runtime.sessions.edit_masks import EditMask

STEPS = 4
MASK = masks.box_mask(16, 16, (0.25, 0.0, 1.0, 0.625))
DEEP = masks.feather_weights(MASK, 2) == 1
BORDER = MASK & ~DEEP
Generate = Callable[..., Generation]

SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"clip_sample": False},
    "DPMSolverMultistepScheduler": {},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
    "UniPCMultistepScheduler": {},
}


def follow(base: torch.Tensor, mask: torch.Tensor = MASK, dilation: int = 0, **arguments: Any) -> FollowBase:
    return FollowBase([base, base], EditMask.of(mask, dilation), **arguments)


def step(follower: FollowBase, latents: torch.Tensor, number: int = 0) -> torch.Tensor:
    return follower(None, number, None, {"latents": latents})["latents"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_after_a_step_the_latents_are_the_blend(dtype: torch.dtype) -> None:
    base, latents = torch.randn(2, 1, 4, 16, 16).to(dtype)
    blended = step(follow(base, feather=2), latents)
    assert blended.dtype == dtype
    weights = masks.weights_per_step(masks.feather_weights(MASK, 2), 2)  # the base has two steps
    expected = (weights * latents.double() + (1 - weights.double()) * base.double()).to(dtype)
    torch.testing.assert_close(blended, expected)
    assert torch.equal(blended[..., ~MASK], base[..., ~MASK])
    assert torch.equal(blended[..., DEEP], latents[..., DEEP])
    assert not torch.equal(blended[..., BORDER], latents[..., BORDER])


def test_outside_not_even_infinity_comes_through() -> None:
    base, latents = torch.randn(2, 1, 4, 16, 16)
    latents[..., ~MASK] = float("inf")
    assert torch.equal(step(follow(base, feather=2), latents)[..., ~MASK], base[..., ~MASK])


def test_no_feather_is_the_hard_border() -> None:
    base, latents = torch.randn(2, 1, 4, 16, 16)
    assert torch.equal(step(follow(base), latents), torch.where(MASK, latents, base))
    assert torch.equal(step(follow(base, feather=0), latents), torch.where(MASK, latents, base))


def test_a_grown_mask_is_feathered_from_its_new_border() -> None:
    base, latents = torch.randn(2, 1, 4, 16, 16)
    grown = masks.grown(MASK, 2)
    assert torch.equal(
        step(follow(base, dilation=2, feather=3), latents), step(follow(base, grown, feather=3), latents)
    )


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_outside_the_mask_every_step_is_the_bases(scheduler: str, pinned_editor: Editor, generate: Generate) -> None:
    """The stand-in refuses a UNet input that differs from the recorded one outside the mask, too."""
    pinned_editor.pipe.scheduler = getattr(diffusers, scheduler)(**SCHEDULERS[scheduler])
    base = generate(num_inference_steps=STEPS)
    soft = pinned_editor.edit(base, "a dog", mask=MASK, feather=2)
    assert soft.unchanged_outside
    for edited, kept in zip(soft.latents, base.latents, strict=True):
        assert torch.equal(edited[..., ~MASK], kept[..., ~MASK])
    assert soft.report.restored_steps == 0
    assert soft.report.sparse_calls == base.recording.num_calls
    hard = pinned_editor.edit(base, "a dog", mask=MASK)
    assert not torch.equal(soft.latents[-1][..., BORDER], hard.latents[-1][..., BORDER])
    assert distance(soft, BORDER) < distance(hard, BORDER)


def distance(edit: Edit, where: torch.Tensor) -> float:
    """How far an edit ends from its base at some sites."""
    return float((edit.latents[-1] - edit.base.latents[-1])[..., where].norm())


def test_feather_zero_is_the_edit_without(pinned_editor: Editor, generate: Generate) -> None:
    base = generate(num_inference_steps=STEPS)
    plain = pinned_editor.edit(base, "a dog", mask=MASK)
    zero = pinned_editor.edit(base, "a dog", mask=MASK, feather=0)
    assert all(torch.equal(a, b) for a, b in zip(plain.latents, zero.latents, strict=True))
    assert "feather" not in str(zero.report)


def test_a_full_mask_has_no_border(pinned_editor: Editor, generate: Generate) -> None:
    base = generate(num_inference_steps=STEPS)
    full = pinned_editor.edit(base, "a dog", mask=torch.ones_like(MASK), feather=4)
    assert torch.equal(full.latents[-1], pinned_editor.dense(base, "a dog").latents)


def test_a_found_mask_and_an_edit_of_a_feathered_edit(pinned_editor: Editor, generate: Generate) -> None:
    base = generate(num_inference_steps=STEPS)
    first = pinned_editor.edit(base, "a dog", mask=LatentDifference(everywhere_ratio=1.0), dense_calls=2, feather=1)
    assert first.unchanged_outside
    assert first.report.feather == 1
    # Inside the first mask's border the base's latents are blends that no scheduler steps to: they are restored.
    second = pinned_editor.edit(first, "a fox", box=(0.0, 0.0, 0.25, 1.0), feather=1)
    assert second.unchanged_outside
    assert pinned_editor.edit(second, "a cat", mask=MASK).unchanged_outside


def test_the_report_says_so(pinned_editor: Editor, generate: Generate) -> None:
    base = generate(num_inference_steps=STEPS)
    report = pinned_editor.edit(base, "a dog", mask=MASK, feather=2, record=False).report
    assert report.feather == 2
    assert "feather   2 sites inside the mask's border" in str(report)
    everywhere = LatentDifference(everywhere_ratio=0.0)
    assert pinned_editor.edit(base, "a dog", mask=everywhere, dense_calls=1, feather=2).report.feather == 0


@pytest.mark.parametrize("feather", [-1, 0.5, True, None])
def test_a_wrong_width_is_refused_before_anything_runs(feather: Any, pinned_editor: Editor, generate: Generate) -> None:
    base = generate(num_inference_steps=STEPS)
    pinned_editor.pipe.unet.original = None
    with pytest.raises(ConfigError, match="feather="):
        pinned_editor.edit(base, "a dog", mask=MASK, feather=feather)
