"""A soft border with the real compiler, whose sparse programs and checks of inputs are not the stand-in's."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisedit_compiler import masks
from fisedit_compiler.pipelines import Edit, Editor, Generation
from tests.support.compiled import compiled_pipeline
from tests.support.compiled_zoo import examples

STEPS = 4
SCHEDULERS = {
    "DDIMScheduler": {"clip_sample": False},
    "EulerDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {},
}
EIGHTHS = st.integers(0, 8).map(lambda number: number / 8)


@st.composite
def drawn(draw: st.DrawFn) -> torch.Tensor:
    """One to three boxes and polygons in 16 x 16 sites."""
    box = st.tuples(EIGHTHS, EIGHTHS, EIGHTHS, EIGHTHS).map(
        lambda ends: (min(ends[0], ends[2]), min(ends[1], ends[3]), max(ends[0], ends[2]), max(ends[1], ends[3]))
    )
    polygon = st.lists(st.tuples(EIGHTHS, EIGHTHS), min_size=3, max_size=5)
    return masks.regions_mask(16, 16, draw(st.lists(box | polygon, min_size=1, max_size=3)))


@cache
def base(scheduler: str) -> Generation:
    """One recorded run of each scheduler for every example."""
    return with_scheduler(scheduler, lambda editor: editor.generate("a cat", seed=3, num_inference_steps=STEPS))


def edited(scheduler: str, source: Generation, prompt: str, **arguments: Any) -> Edit:
    return with_scheduler(scheduler, lambda editor: editor.edit(source, prompt, **arguments))


def with_scheduler(scheduler: str, run: Callable[[Editor], Any]) -> Any:
    pipe = compiled_pipeline()
    shared, pipe.scheduler = pipe.scheduler, getattr(diffusers, scheduler)(**SCHEDULERS[scheduler])
    try:
        return run(Editor(pipe))
    finally:
        pipe.scheduler = shared


def assert_follows(edit: Edit, source: Generation) -> None:
    assert edit.unchanged_outside
    for latents, kept in zip(edit.latents, source.latents, strict=True):
        assert torch.equal(latents[..., ~edit.mask], kept[..., ~edit.mask])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@examples(0.4)
@given(mask=drawn(), feather=st.integers(0, 5))
def test_outside_the_mask_nothing_moves(scheduler: str, mask: torch.Tensor, feather: int) -> None:
    source = base(scheduler)
    edit = edited(scheduler, source, "a dog", mask=mask, feather=feather, record=False)
    assert_follows(edit, source)
    assert edit.report.restored_steps == 0
    if mask.any():
        assert not torch.equal(edit.latents[-1][..., mask], source.latents[-1][..., mask])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@examples(0.2)
@given(first=drawn(), second=drawn(), feather=st.integers(1, 4))
def test_nor_in_an_edit_of_a_feathered_edit(
    scheduler: str, first: torch.Tensor, second: torch.Tensor, feather: int
) -> None:
    """Its border holds blends that no scheduler steps to; the second edit restores them wherever its mask is not."""
    once = edited(scheduler, base(scheduler), "a dog", mask=first, feather=feather)
    assert_follows(edited(scheduler, once, "a fox", mask=second, feather=feather, record=False), once)
