"""A stock diffusers pipeline around the compiled UNet: any scheduler, no word of it knows what happened.

Outside the mask the *final* latents must be the base's bit for bit, which they are only if every step's
prediction was, and the scheduler's arithmetic is the same sum for equal inputs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from fisedit_compiler import SparseModule
from fisedit_compiler.errors import RecordingError
from tests.support.compiled import box, compiled_pipeline, run_pipeline

# NumPy's own warning, from schedulers that interpolate tensors with it.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
MASK = box(4, 3, 10, 9, 16, 16)
STEPS = 4
CALLS = {
    "DDIMScheduler": STEPS,
    "DPMSolverMultistepScheduler": STEPS,
    "EulerDiscreteScheduler": STEPS,
    "EulerAncestralDiscreteScheduler": STEPS,  # draws noise at every step, from the run's generator
    "LCMScheduler": STEPS,  # likewise, and so does TCD
    "TCDScheduler": STEPS,
    "PNDMScheduler": STEPS + 1,  # repeats a timestep to warm up
    "HeunDiscreteScheduler": 2 * STEPS - 1,  # second order: two calls a step but the last
    "KDPM2DiscreteScheduler": 2 * STEPS - 1,
}


@pytest.fixture
def pipe() -> Iterator[Any]:
    """The shared pipeline, its scheduler put back afterwards."""
    pipe = compiled_pipeline()
    scheduler = pipe.scheduler
    yield pipe
    pipe.scheduler = scheduler


def record_and_edit(pipe: Any, mask: Tensor = MASK, **settings: Any) -> tuple[Tensor, Tensor, int]:
    """Final latents of a base and its edit, and the number of calls either made."""
    with pipe.unet.record() as recording:
        base = run_pipeline(pipe, num_inference_steps=STEPS, **settings)
    prompt = settings.pop("prompt", "a cat")
    other = "a dog" if isinstance(prompt, str) else ["a dog"] * len(prompt)
    with pipe.unet.edit(recording, mask) as session:
        edited = run_pipeline(pipe, **{**settings, "prompt": other}, num_inference_steps=STEPS)
    assert session.call == recording.num_calls
    return base, edited, session.call


def assert_edited_inside_only(base: Tensor, edited: Tensor, mask: Tensor = MASK) -> None:
    assert bool(edited.isfinite().all())
    assert torch.equal(edited[..., ~mask], base[..., ~mask])
    assert bool((edited[..., mask] != base[..., mask]).any())


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0], ids=["guided", "unguided"])
@pytest.mark.parametrize("name", sorted(CALLS))
def test_final_latents_outside_the_mask_are_the_bases(pipe: Any, name: str, guidance_scale: float):
    options = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)
    base, edited, calls = record_and_edit(pipe, guidance_scale=guidance_scale)
    assert calls == CALLS[name]
    assert_edited_inside_only(base, edited)


def test_a_recorded_run_is_the_plain_run(pipe: Any):
    compiled = pipe.unet
    with compiled.record():
        recorded = run_pipeline(pipe)
    assert torch.equal(run_pipeline(pipe), recorded)
    try:
        pipe.unet = compiled.original
        assert torch.equal(run_pipeline(pipe), recorded)
    finally:
        pipe.unet = compiled


@pytest.mark.parametrize("settings", [{"num_images_per_prompt": 2}, {"prompt": ["a cat", "a rocket"]}], ids=str)
@pytest.mark.parametrize("guidance_scale", [5.0, 1.0], ids=["guided", "unguided"])
def test_several_images(pipe: Any, settings: dict[str, Any], guidance_scale: float):
    base, edited, _ = record_and_edit(pipe, guidance_scale=guidance_scale, **settings)
    assert base.shape[0] == 2
    assert_edited_inside_only(base, edited)
    assert not torch.equal(edited[0], edited[1])


def test_other_image_sizes(pipe: Any):
    mask = box(3, 5, 9, 18, 12, 24)
    base, edited, _ = record_and_edit(pipe, mask, height=24, width=48)
    assert base.shape[-2:] == (12, 24)
    assert_edited_inside_only(base, edited, mask)


def test_a_mask_of_the_images_size(pipe: Any):
    pixels = MASK.repeat_interleave(2, 0).repeat_interleave(2, 1)
    base, edited, _ = record_and_edit(pipe, pixels)
    assert_edited_inside_only(base, edited)


@pytest.mark.parametrize("timestep_spacing", ["leading", "trailing"])
def test_v_prediction_and_zero_terminal_snr(pipe: Any, timestep_spacing: str):
    pipe.scheduler = diffusers.DDIMScheduler.from_config(
        pipe.scheduler.config,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing=timestep_spacing,
    )
    base, edited, _ = record_and_edit(pipe)
    assert_edited_inside_only(base, edited)


def test_what_mixes_all_sites_between_calls_is_refused_in_words(pipe: Any):
    """Rescaled guidance divides by a deviation over the whole prediction, so the edit would move everything."""
    with pytest.raises(RecordingError, match="guidance_rescale"):
        record_and_edit(pipe, guidance_rescale=0.7)
    assert_edited_inside_only(*record_and_edit(pipe)[:2])


def stop_after(steps: int) -> Any:
    """A step callback that stops the run as diffusers' documentation does."""

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step + 1 == steps
        return tensors

    return callback


@pytest.mark.parametrize("steps", [2, 3])
def test_a_base_that_was_stopped_is_named_by_its_edit(pipe: Any, steps: int):
    """The recording sees calls, not the pipeline, but other steps would have shown in the timesteps."""
    with pipe.unet.record() as recording:
        run_pipeline(pipe, num_inference_steps=STEPS, callback_on_step_end=stop_after(steps))
    assert recording.num_calls == steps
    with (
        pytest.raises(RecordingError, match=rf"call {steps + 1} .*only {steps}: all timesteps.*stopped.*_interrupt"),
        pipe.unet.edit(recording, MASK),
    ):
        run_pipeline(pipe, prompt="a dog", num_inference_steps=STEPS)


def test_an_edit_that_was_stopped_is_named_and_its_base_goes_on(pipe: Any):
    with pipe.unet.record() as recording:
        base = run_pipeline(pipe, num_inference_steps=STEPS)
    with (
        pytest.raises(RecordingError, match=r"ended after 2 calls, the recording has 4: it was stopped.*_interrupt"),
        pipe.unet.edit(recording, MASK),
    ):
        run_pipeline(pipe, prompt="a dog", num_inference_steps=STEPS, callback_on_step_end=stop_after(2))
    with pipe.unet.edit(recording, MASK):
        assert_edited_inside_only(base, run_pipeline(pipe, prompt="a dog", num_inference_steps=STEPS))


@pytest.mark.parametrize(
    ("recorded", "prompts", "words"),
    [
        (1, ["a dog", "a fox"], rf"call {STEPS + 1} of the edit.*first timestep again.*anew for each"),
        (2, ["a dog"], rf"after {STEPS} calls, but the recording holds 2 runs of {2 * STEPS}"),
        (1, [], r"ended after 0 calls.*Set `pipe.unet = compiled`"),
    ],
)
def test_other_numbers_of_runs_in_a_block_are_named(pipe: Any, recorded: int, prompts: list[str], words: str):
    with pipe.unet.record() as recording:
        for _ in range(recorded):
            run_pipeline(pipe, num_inference_steps=STEPS)
    with pytest.raises(RecordingError, match=words), pipe.unet.edit(recording, MASK):
        for prompt in prompts:
            run_pipeline(pipe, prompt=prompt, num_inference_steps=STEPS)


def test_the_pipelines_dtype_may_change():
    from tests.support.tiny_pipeline import make_tiny_pipeline

    pipe = make_tiny_pipeline()
    pipe.unet = type(compiled_pipeline().unet)(pipe.unet, compiled_pipeline().unet.sparsify_config)
    with pipe.unet.record() as in_float32:
        run_pipeline(pipe, num_inference_steps=1)
    pipe.to(torch.bfloat16)
    with pytest.raises(RecordingError, match="another model"):
        pipe.unet.edit(in_float32, MASK).__enter__()
    assert pipe.unet.dtype == pipe.unet.original.dtype == torch.bfloat16
    base, edited, _ = record_and_edit(pipe)
    assert base.dtype == torch.bfloat16
    assert_edited_inside_only(base, edited)


def test_the_pipeline_knows_its_parts(pipe: Any):
    assert pipe.components["unet"] is pipe.unet
    assert type(pipe.unet) is SparseModule
    assert pipe.config.unet == ("diffusers", "UNet2DConditionModel")
    assert pipe.device == torch.device("cpu") and pipe.dtype == torch.float32
    other = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    assert other.unet is pipe.unet
    # from_pipe compares type() with the annotation: the UNet has to be handed over by name.
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe, unet=pipe.unet)
    assert other.unet is pipe.unet


def test_saving_the_pipeline_saves_the_original(pipe: Any, tmp_path: Path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert {"config.json"} < set(os.listdir(tmp_path / "unet"))
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    assert type(loaded.unet) is diffusers.UNet2DConditionModel
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(run_pipeline(loaded), run_pipeline(pipe))
