"""Models made for few steps: the schedules of LCM, TCD and Turbo, one to eight steps, guidance embedded, off or on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from fisedit_compiler import Editor, masks
from fisedit_compiler.errors import ConfigError, PromptError
from fisedit_compiler.pipelines.detectors import EarlyDifference, LatentDifference
from fisedit_compiler.pipelines.detectors.base import LOOKS, SHORT_RUN
from fisedit_compiler.pipelines.editor import EDITOR_CONFIG
from tests.support.compiled import run_pipeline
from tests.support.tiny_pipeline import PICTURE, guided_by_embedding, latent_consistency, make_tiny_pipeline, sdxl

# NumPy's own warning, from schedulers that interpolate tensors with it.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
BASE, EDIT = "a cat on a desk", "a dog on a desk"
BOX = (0.2, 0.2, 0.6, 0.6)
MASK = masks.box_mask(16, 16, BOX)
OTHER = masks.box_mask(16, 16, (0.5, 0.0, 1.0, 0.5))
FULL = torch.ones(16, 16, dtype=torch.bool)
TRAILING = {"timestep_spacing": "trailing"}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "LCMScheduler": {},
    "TCDScheduler": {},
    "EulerAncestralDiscreteScheduler": TRAILING,
    "EulerDiscreteScheduler": TRAILING,
    "DDIMScheduler": TRAILING,
    "DPMSolverMultistepScheduler": TRAILING,
    "UniPCMultistepScheduler": TRAILING,
}
MAKE = {
    "sd": make_tiny_pipeline,
    "sdxl": lambda: sdxl()[0],
    "sd, embedded": lambda: guided_by_embedding(make_tiny_pipeline()),
    "latent consistency": lambda: latent_consistency()[0],
}
STOCHASTIC = [
    (name, scheduler, steps, guidance)
    for name in MAKE
    for scheduler in ("LCMScheduler", "EulerAncestralDiscreteScheduler")
    for steps, guidance in ((1, 0.0), (3, 1.0), (3, 5.0))
    if name != "latent consistency" or scheduler == "LCMScheduler"
]
EVERY_SCHEDULE = [("sd", scheduler, steps, 0.0) for scheduler in SCHEDULERS for steps in (1, 2, 4, 8)]
CASES = pytest.mark.parametrize(
    ("name", "scheduler", "steps", "guidance"), list(dict.fromkeys(EVERY_SCHEDULE + STOCHASTIC))
)
FEW_CASES = pytest.mark.parametrize(
    ("name", "scheduler", "steps", "guidance"), [case for case in STOCHASTIC if case[2:] != (3, 1.0)]
)


@cache
def prepared(name: str) -> Editor:
    pipe = MAKE[name]()
    pipe.set_progress_bar_config(disable=True)
    # No fallback to dense calls: with a full mask, too, the sparse program is the subject.
    return Editor(pipe, replace(EDITOR_CONFIG, dense_above=1.0)).prepare()


@contextmanager
def editor_of(name: str, scheduler: str) -> Iterator[Editor]:
    """The shared Editor with another scheduler, its own put back afterwards."""
    editor = prepared(name)
    own = editor.pipe.scheduler
    editor.pipe.scheduler = getattr(diffusers, scheduler).from_config(own.config, **SCHEDULERS[scheduler])
    try:
        yield editor
    finally:
        editor.pipe.scheduler = own


def generate(editor: Editor, steps: int, guidance: float = 0.0, **options: Any) -> Any:
    return editor.generate(BASE, seed=3, num_inference_steps=steps, guidance_scale=guidance, options=options)


def kinds(edit: Any) -> list[str]:
    return [kind for kind, _ in edit.report.calls]


def assert_alike(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Up to rounding: one step of a schedule may multiply latents by many."""
    size = float(expected.abs().max())
    torch.testing.assert_close(found / size, expected / size, rtol=1e-4, atol=1e-4)


@CASES
def test_edits_keep_the_base_outside_and_a_full_mask_is_the_dense_run(
    name: str, scheduler: str, steps: int, guidance: float
) -> None:
    with editor_of(name, scheduler) as editor:
        base = generate(editor, steps, guidance)
        edit = editor.edit(base, EDIT, mask=MASK)
        assert edit.unchanged_outside and not edit.report.restored_steps
        assert len(kinds(edit)) == len(base.latents) and "dense" not in kinds(edit)
        assert bool((edit.latents[-1] != base.latents[-1])[..., MASK].any())
        full = editor.edit(base, EDIT, mask=FULL, reuse="off")
        assert set(kinds(full)) == {"sparse"}
        assert_alike(full.latents[-1], editor.dense(base, EDIT).latents)


@FEW_CASES
def test_a_base_is_what_the_stock_pipeline_makes(name: str, scheduler: str, steps: int, guidance: float) -> None:
    with editor_of(name, scheduler) as editor:
        base = generate(editor, steps, guidance)
        assert base.recording is not None
        guided = guidance > 1 and editor.pipe.unet.config.time_cond_proj_dim is None
        assert [call.batch for call in base.recording.calls] == [2 if guided else 1] * steps
        compiled = editor.pipe.unet
        editor.pipe.unet = compiled.original
        try:
            image = editor.pipe(
                BASE, num_inference_steps=steps, guidance_scale=guidance, generator=torch.Generator().manual_seed(3)
            ).images[0]
        finally:
            editor.pipe.unet = compiled
    assert np.array_equal(np.asarray(image), np.asarray(base.image))


@FEW_CASES
def test_edits_of_edits_several_edits_and_edits_that_reuse(
    name: str, scheduler: str, steps: int, guidance: float
) -> None:
    with editor_of(name, scheduler) as editor:
        base = generate(editor, steps, guidance)
        edit = editor.edit(base, EDIT, mask=MASK)
        again = editor.edit(edit, "a dog on a chair", mask=OTHER)
        assert again.unchanged_outside
        for one, alone in zip(
            editor.edit_many(base, [EDIT, "a fish on a desk"], mask=MASK),
            (edit, editor.edit(base, "a fish on a desk", mask=MASK)),
            strict=True,
        ):
            assert one.unchanged_outside
            assert_alike(one.latents[-1], alone.latents[-1])
        loose = editor.edit(base, EDIT, mask=MASK, reuse=1e9)
        assert loose.unchanged_outside and kinds(loose) == ["sparse"] + ["shallow"] * (steps - 1)


@pytest.mark.parametrize("name", MAKE)
def test_what_is_compiled_ahead_is_what_runs(name: str) -> None:
    with editor_of(name, "LCMScheduler") as editor:
        before = editor.compiled._programs.executables()
        generate(editor, 1, 5.0)
        assert len(before) == 1 and editor.compiled._programs.executables() == before


def test_the_weight_of_embedded_guidance_counts() -> None:
    with editor_of("sd, embedded", "LCMScheduler") as editor:
        weak, strong = (generate(editor, 2, guidance) for guidance in (1.0, 9.0))
    assert not torch.equal(weak.latents[-1], strong.latents[-1])


# -- masks that are found --------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize(("name", "guidance"), [("sd", 0.0), ("sd", 5.0), ("sd, embedded", 5.0)])
def test_a_mask_is_found_in_one_call(name: str, guidance: float, steps: int) -> None:
    with editor_of(name, "LCMScheduler") as editor:
        base = generate(editor, steps, guidance)
        edit = editor.edit(base, EDIT, mask="auto", box=BOX)
        whole = editor.edit(base, EDIT)
    assert edit.report.detection is not None and edit.report.detection.steps == 1
    assert kinds(edit)[0] == "dense" and not {"dense"} & set(kinds(edit)[1:]) and len(kinds(edit)) == steps
    assert edit.unchanged_outside and bool(edit.mask.any()) and not bool((edit.mask & ~MASK).any())
    assert ("found in the last step" in edit.report.note) == (steps == 1)
    # Random weights change everything, which is known after one call, too.
    assert whole.report.detection is not None and whole.report.detection.steps == 1
    assert "whole picture" in whole.report.note and kinds(whole) == ["dense"] * steps


def test_the_first_step_says_the_same_whatever_schedule_and_guidance() -> None:
    """All that differs after it is the prediction, times a number that schedule and guidance decide."""
    quiet = []
    runs = {
        "LCMScheduler": (1, 5.0),
        "TCDScheduler": (2, 0.0),
        "DDIMScheduler": (4, 5.0),
        "EulerDiscreteScheduler": (3, 0.0),
    }
    for scheduler, (steps, guidance) in runs.items():
        with editor_of("sd", scheduler) as editor:
            edit = editor.edit(generate(editor, steps, guidance), EDIT)
        assert edit.report.detection is not None
        quiet.append(edit.report.detection.quiet)
    assert quiet == pytest.approx([quiet[0]] * len(quiet), rel=0.01)


def test_how_many_steps_are_looked_at() -> None:
    rule = EarlyDifference()
    assert [rule.looks(steps) for steps in (1, 2, SHORT_RUN, SHORT_RUN + 1, 25)] == [1, 1, 1, LOOKS, LOOKS]
    assert [EarlyDifference(max_calls=3).looks(steps) for steps in (1, 2, 4, 25)] == [1, 1, 3, 3]
    assert [LatentDifference().looks(steps) for steps in (1, 4, 25)] == [1, 3, 4], "the published rule sums four"
    for none in (0, -1):
        with pytest.raises(ConfigError, match="max_calls 1 or more"):
            EarlyDifference(max_calls=none)


def test_dense_calls_of_a_run_of_one_step() -> None:
    with editor_of("sd", "LCMScheduler") as editor:
        base = generate(editor, 1)
        assert editor.edit(base, EDIT, mask="auto", box=BOX, dense_calls=1).unchanged_outside
        for wrong in (0, 2):
            with pytest.raises(ConfigError, match=rf"dense_calls={wrong} must be at least 1 and no more: .* one step"):
                editor.edit(base, EDIT, dense_calls=wrong)


# -- pictures of the user's, and schedules of one's own --------------------------------------------------


@FEW_CASES
def test_pictures_are_loaded(name: str, scheduler: str, steps: int, guidance: float) -> None:
    with editor_of(name, scheduler) as editor:
        loaded = editor.load(
            PICTURE, BASE, inversion="ddim", measure=False, num_inference_steps=steps, guidance_scale=guidance
        )
        edit = editor.edit(loaded, EDIT, mask=MASK)
        assert edit.unchanged_outside and len(loaded.latents) == steps
        full = editor.edit(loaded, EDIT, mask=FULL, reuse="off")
        assert_alike(full.latents[-1], editor.dense(loaded, EDIT).latents)


OWN = [
    ("sd", "LCMScheduler", {"timesteps": [999, 759, 499, 259]}, [999, 759, 499, 259]),
    ("sdxl", "TCDScheduler", {"timesteps": [799], "eta": 1.0}, [799]),
    ("sd", "TCDScheduler", {"eta": 0.0}, [999, 759, 499, 259]),
    ("sd", "EulerDiscreteScheduler", {"sigmas": [14.6, 4.0, 0.7, 0.0]}, None),
    ("latent consistency", "LCMScheduler", {"original_inference_steps": 20}, [999, 749, 499, 249]),
    ("latent consistency", "LCMScheduler", {"timesteps": [999, 499]}, [999, 499]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "scheduler", "options", "timesteps"), OWN, ids=str)
def test_schedules_of_ones_own(name: str, scheduler: str, options: dict[str, Any], timesteps: list[int] | None) -> None:
    with editor_of(name, scheduler) as editor:
        base = generate(editor, 4, **options)
        loads = [
            editor.load(PICTURE, BASE, num_inference_steps=4, inversion=way, options=options)  # type: ignore[arg-type]
            for way in ("ddim", "edit-friendly")
        ]
        for one in (base, *loads):
            assert one.recording is not None
            assert timesteps in (None, [call.timestep for call in one.recording.calls])
            edit = editor.edit(one, EDIT, mask="auto", box=BOX)
            assert edit.unchanged_outside and kinds(edit) == ["dense"] + ["sparse"] * (len(base.latents) - 1)
    assert all(len(one.latents) == len(base.latents) for one in loads)


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        ("DDIMScheduler", {"timesteps": [999, 499]}),
        ("EulerAncestralDiscreteScheduler", {"sigmas": [14.6, 1.0]}),
    ],
)
def test_a_schedule_that_the_scheduler_does_not_take_is_refused(scheduler: str, options: dict[str, Any]) -> None:
    (option,) = options
    with editor_of("sd", scheduler) as editor:
        for run in (
            lambda: generate(editor, 2, **options),
            lambda: editor.load(PICTURE, BASE, num_inference_steps=2, options=options),
        ):
            with pytest.raises(ConfigError, match=rf"options\['{option}'\]: {scheduler} takes no {option}"):
                run()


@pytest.mark.parametrize(
    ("name", "steps", "options", "said"),
    [
        ("sd", 60, {}, "num_inference_steps=60 .*smaller than `num_inference_steps`"),
        ("sd", 2, {"timesteps": [3, 500]}, "must be in descending order"),
        ("sd", 2, {"timesteps": []}, "list index out of range"),
        ("latent consistency", 4, {"original_inference_steps": 2}, "original_steps"),
    ],
)
def test_a_schedule_that_the_scheduler_refuses_is_named(
    name: str, steps: int, options: dict[str, Any], said: str
) -> None:
    with editor_of(name, "LCMScheduler") as editor:
        for run in (
            lambda: generate(editor, steps, **options),
            lambda: editor.load(PICTURE, BASE, num_inference_steps=steps, options=options),
        ):
            with pytest.raises(ConfigError, match=rf"^LCMScheduler refuses a schedule of .*{said}.*Ask for fewer"):
                run()


# -- the latent consistency pipeline ---------------------------------------------------------------------


def test_a_latent_consistency_picture_is_that_of_its_latents() -> None:
    """That pipeline decodes another tensor than the one its callback is known by."""
    with editor_of("latent consistency", "LCMScheduler") as editor:
        for one in (base := generate(editor, 4, 8.0), editor.edit(base, EDIT, mask="auto", box=BOX)):
            decoded = editor.pipe.vae.decode(one.latents[-1] / editor.pipe.vae.config.scaling_factor).sample
            (picture,) = editor.pipe.image_processor.postprocess(decoded.detach(), output_type="pil")
            assert np.array_equal(np.asarray(picture), np.asarray(one.image))


def test_without_an_editor_it_is_followed_too() -> None:
    with editor_of("latent consistency", "LCMScheduler") as editor:
        with editor.compiled.record() as recording:
            base = run_pipeline(editor.pipe, BASE)
        with editor.compiled.edit(recording, MASK):
            edited = run_pipeline(editor.pipe, EDIT)
    assert torch.equal(edited[..., ~MASK], base[..., ~MASK]) and not torch.equal(edited, base)


def test_a_scheduler_that_ends_otherwise_is_refused_there() -> None:
    for scheduler in ("DDIMScheduler", "TCDScheduler"):
        with (
            editor_of("latent consistency", scheduler) as editor,
            pytest.raises(ConfigError, match=f"{scheduler}.*LCM"),
        ):
            generate(editor, 2)


def test_a_negative_prompt_is_refused_where_there_is_no_place_for_it() -> None:
    with editor_of("latent consistency", "LCMScheduler") as editor:
        with pytest.raises(PromptError, match="LatentConsistencyModelPipeline takes no negative prompt"):
            editor.generate(BASE, seed=3, negative_prompt="blurry")
        base = editor.generate(BASE, seed=3, negative_prompt="", num_inference_steps=1)
        with pytest.raises(PromptError, match="leave negative_prompt out"):
            editor.edit(base, EDIT, negative_prompt="blurry")
        assert editor.edit_many(base, [EDIT, BASE], mask=MASK)[1].report.mask_source == "none"
