"""A picture of the user's as a base: it comes back exactly, and edits of it like those of a generated one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from fisedit_compiler import SparsifyConfig
from fisedit_compiler.errors import ConfigError, PictureError, PromptError, RecordingError
from fisedit_compiler.pipelines import DdimInversion, Edit, Editor, LatentDifference, Loaded
from fisedit_compiler.pipelines.inversion import load as inversion
from fisedit_compiler.pipelines.inversion.pictures import encoded
from tests.support.tiny_pipeline import make_tiny_pipeline

STEPS = 6
METHODS = ("ddim", "edit-friendly")
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "zero-snr": (
        "DPMSolverMultistepScheduler",
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    ),
    "euler": ("EulerDiscreteScheduler", {}),
    "ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "heun": ("HeunDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
Load = Callable[..., Loaded]


def picture(width: int = 32, height: int = 32) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def columns(first: int, last: int) -> torch.Tensor:
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:, first:last] = True
    return mask


def local() -> LatentDifference:
    """The automatic mask that never takes the whole picture: random weights change a little everywhere."""
    return LatentDifference(everywhere_ratio=1.0)


def pixels(mask: torch.Tensor) -> np.ndarray[Any, Any]:
    return mask.numpy().repeat(2, 0).repeat(2, 1)


def assert_pixels_are_the_users(edit: Edit, outside: torch.Tensor) -> None:
    assert np.array_equal(np.asarray(edit.image)[pixels(outside)], picture()[pixels(outside)])


@pytest.fixture
def load(pinned_editor: Editor) -> Load:
    def run(prompt: str = "a cat", image: Any = None, **settings: Any) -> Loaded:
        given = picture() if image is None else image
        return pinned_editor.load(given, prompt, **{"num_inference_steps": STEPS, "measure": False, **settings})

    return run


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_any_scheduler_ends_in_the_picture_and_edits_it(
    scheduler: str, method: str, pinned_editor: Editor, load: Load
) -> None:
    name, config = SCHEDULERS[scheduler]
    pinned_editor.pipe.scheduler = given = getattr(diffusers, name)(**config)
    base = load(inversion=method)
    assert pinned_editor.pipe.scheduler is given
    assert torch.equal(base.latents[-1], encoded(pinned_editor.pipe, Image.fromarray(picture())))
    # The base's own prompt goes the base's way, whether or not anything is recorded.
    assert torch.equal(pinned_editor.dense(base, "a cat").latents, base.latents[-1])

    first = pinned_editor.edit(base, "a dog", mask=columns(0, 6))
    assert first.unchanged_outside and first.report.restored_steps == 0
    assert not torch.equal(first.latents[-1], base.latents[-1])
    assert_pixels_are_the_users(first, ~columns(0, 6))

    second = pinned_editor.edit(first, "a fox", mask=columns(4, 10))
    assert second.unchanged_outside and second.report.restored_steps == 0
    assert_pixels_are_the_users(second, ~columns(0, 10))
    kept = pixels(columns(0, 4))
    assert np.array_equal(np.asarray(second.image)[kept], np.asarray(first.image)[kept])


@pytest.mark.parametrize("method", METHODS)
def test_the_picture_is_the_users(method: str, load: Load, pinned_editor: Editor) -> None:
    base = load(inversion=method)
    assert np.array_equal(np.asarray(base.image), picture())
    assert not np.array_equal(np.asarray(base.reconstruction), picture())
    assert base.inversion.method == method
    assert base.inversion.calls == (STEPS - 1 if method == "ddim" else 0)
    identity = pinned_editor.edit(base, "a cat")
    assert identity.image is base.image
    assert base.recording.num_calls == len(base.latents) == STEPS


def test_a_full_mask_is_the_dense_run(load: Load, pinned_editor: Editor) -> None:
    base = load()
    edit = pinned_editor.edit(base, "a dog", mask=columns(0, 16))
    assert torch.equal(edit.latents[-1], pinned_editor.dense(base, "a dog").latents)


def test_the_automatic_mask_runs_densely_then_follows(load: Load, pinned_editor: Editor) -> None:
    base = load()
    edit = pinned_editor.edit(base, "a dog", mask=local(), dense_calls=2)
    assert edit.report.dense_calls == 2 and 0 < edit.report.area < 1
    assert edit.unchanged_outside
    assert_pixels_are_the_users(edit, ~edit.mask)
    # Dense calls of the same prompt follow the corrections, too, so they find nothing.
    assert pinned_editor.edit(base, "a  cat", dense_calls=2).image is base.image


def test_guidance_one_and_an_empty_prompt(load: Load, pinned_editor: Editor) -> None:
    base = load("", guidance_scale=1.0)
    assert base.recording.samples[0].shape[0] == 1
    assert pinned_editor.edit(base, "a dog", mask=columns(0, 6)).unchanged_outside


def test_other_sizes_and_negative_prompts(load: Load, pinned_editor: Editor) -> None:
    base = load(image=picture(48, 24), negative_prompt="a fox")
    assert base.image.size == (48, 24) and base.latents[0].shape[-2:] == (12, 24)
    assert base.negative_prompt == "a fox"
    mask = torch.zeros(12, 24, dtype=torch.bool)
    mask[:6] = True
    edit = pinned_editor.edit(base, "a dog", mask=mask)
    assert np.array_equal(np.asarray(edit.image)[12:], picture(48, 24)[12:])
    resized = load(image=picture(50, 50), resize=True)
    assert resized.image.size == (32, 32)


@pytest.mark.parametrize("steps", [1, 2])
def test_very_short_runs(steps: int, load: Load, pinned_editor: Editor) -> None:
    base = load(num_inference_steps=steps, inversion="ddim")
    assert base.inversion.calls == steps - 1
    assert pinned_editor.edit(base, "a dog", mask=columns(0, 6)).unchanged_outside


def test_free_run_is_that_of_the_same_noise_without_corrections(load: Load, pinned_editor: Editor) -> None:
    base = load(measure=True, seed=3, inversion="ddim")
    free = pinned_editor.pipe(
        "a cat",
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        latents=base.initial_latents / pinned_editor.pipe.scheduler.init_noise_sigma,
        output_type="np",
    ).images[0]
    error = np.square(np.rint(free * 255) - picture().astype(float)).mean()
    assert base.inversion.free_psnr == pytest.approx(10 * np.log10(255**2 / error), abs=0.01)
    assert load(inversion="ddim").inversion.free_psnr is None


def test_the_report_says_how_it_was_inverted(load: Load) -> None:
    text = str(load(measure=True, inversion="ddim").inversion)
    assert "ddim" in text and text.count("dB") == 2
    assert "not measured" in str(load(inversion="ddim").inversion)
    assert "edit-friendly" in repr(load(inversion="edit-friendly"))


@pytest.mark.parametrize(
    ("natural", "method"), [(0.0, "ddim"), (99.0, "edit-friendly"), (float("nan"), "edit-friendly")]
)
def test_auto_is_ddim_if_its_noise_gives_the_picture_back(
    natural: float, method: str, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inversion, "NATURAL_PSNR", natural)
    base = load(inversion="auto")
    assert base.inversion.method == method
    assert base.inversion.calls == STEPS - 1
    assert ("dB only" in str(base.inversion)) == (method == "edit-friendly")
    assert (base.inversion.free_psnr is None) == (method == "edit-friendly")
    assert torch.equal(base.initial_latents, load(inversion=method).initial_latents)


def test_auto_is_edit_friendly_where_nothing_can_be_walked_back(load: Load, pinned_editor: Editor) -> None:
    pinned_editor.pipe.scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type="sample")
    base = load()
    assert base.inversion.method == "edit-friendly" and base.inversion.calls == 0
    assert "'sample'" in base.inversion.note
    with pytest.raises(ConfigError, match="edit-friendly"):
        load(inversion="ddim")


def test_ddim_with_settings_of_ones_own(load: Load) -> None:
    assert load(inversion=DdimInversion(rounds=2)).inversion.calls == 2 * (STEPS - 1)
    assert load(inversion=DdimInversion(noisy_start=False)).inversion.calls == STEPS


def test_seeds_draw_other_noise_and_repeat(load: Load) -> None:
    first, again, other = (load(seed=seed, inversion="edit-friendly") for seed in (0, 0, 1))
    assert torch.equal(first.initial_latents, again.initial_latents)
    assert not torch.equal(first.initial_latents, other.initial_latents)


def test_mistakes_are_found_before_anything_runs(load: Load, pinned_editor: Editor, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a model was run")

    for module in (pinned_editor.pipe.unet, pinned_editor.pipe.vae.encoder, pinned_editor.pipe.text_encoder):
        module.register_forward_pre_hook(refuse)
    with pytest.raises(PictureError, match="32 x 24"):
        load(image=picture(33, 31))
    with pytest.raises(PictureError, match="no picture"):
        load(image=tmp_path / "missing.png")
    with pytest.raises(PromptError, match="fireworks"):
        load("a cat " * 15 + "under fireworks")
    with pytest.raises(PromptError, match="negative prompt"):
        load(negative_prompt="a cat " * 20)
    with pytest.raises(ConfigError, match="'null-text' is unknown"):
        load(inversion="null-text")
    with pytest.raises(ConfigError, match="at least one step"):
        load(num_inference_steps=0)
    with pytest.raises(ConfigError, match="rounds=0"):
        DdimInversion(rounds=0)
    pinned_editor.pipe.vae.encoder = None
    with pytest.raises(ConfigError, match="encoder"):
        load()


def test_another_scheduler_than_the_loaded_ones_is_refused(load: Load, pinned_editor: Editor) -> None:
    base = load()
    pinned_editor.pipe.scheduler = diffusers.EulerDiscreteScheduler()
    with pytest.raises(RecordingError, match="EulerDiscreteScheduler"):
        pinned_editor.edit(base, "a dog", mask=columns(0, 6))


def test_an_interrupted_load_leaves_the_pipeline_as_it_was(load: Load, pinned_editor: Editor) -> None:
    pipe = pinned_editor.pipe
    compiled, left = pinned_editor.compiled, 2
    scheduler, config = pipe.scheduler, dict(pipe.config)

    def interrupt(*_: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    handle = compiled.original.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        load()
    handle.remove()
    assert pipe.scheduler is scheduler and dict(pipe.config) == config and pipe.unet is compiled
    assert load().recording.num_calls == STEPS


@pytest.fixture(scope="module")
def compiled_editor() -> Iterator[Editor]:
    """The real compiler on the tiny pipeline; large masks run sparsely, too."""
    with Editor(make_tiny_pipeline(), SparsifyConfig(dense_above=1.0)) as editor:
        yield editor


@pytest.mark.parametrize("scheduler", ["ddim", "zero-snr"])
def test_with_the_real_compiler(scheduler: str, compiled_editor: Editor) -> None:
    name, config = SCHEDULERS[scheduler]
    compiled_editor.pipe.scheduler = getattr(diffusers, name)(**config)
    base = compiled_editor.load(picture(), "a cat", num_inference_steps=STEPS)
    torch.testing.assert_close(
        base.latents[-1], encoded(compiled_editor.pipe, Image.fromarray(picture())), rtol=0, atol=0
    )
    first = compiled_editor.edit(base, "a dog", mask=columns(0, 6))
    assert first.report.sparse_calls == STEPS and first.report.restored_steps == 0
    assert first.unchanged_outside
    second = compiled_editor.edit(first, "a fox", mask=local(), dense_calls=2)
    assert second.unchanged_outside
    assert_pixels_are_the_users(second, ~(columns(0, 6) | second.mask))
    # The same text within the mask ends where the base does. A sparse call rounds otherwise than a dense one; guidance
    # and the division by a small signal at the first step make about a thousand times as much of it.
    same = compiled_editor.edit(base, "a  cat", mask=columns(0, 6), record=False)
    torch.testing.assert_close(same.latents[-1], base.latents[-1], rtol=2e-3, atol=2e-3)
