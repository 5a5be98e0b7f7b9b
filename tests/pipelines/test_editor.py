"""The Editor's promises, on a tiny random pipeline with a stand-in for the compiled UNet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from fisedit_compiler import masks
from fisedit_compiler.errors import ModeError
from fisedit_compiler.pipelines import (
    Edit,
    Editor,
    Generation,
    LatentDifference,
)

STEPS = 7
Generate = Callable[..., Generation]

SCHEDULERS = {
    "DDIMScheduler": {"clip_sample": False},
    "DPMSolverMultistepScheduler": {},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
    "UniPCMultistepScheduler": {},
}


def left_half() -> torch.Tensor:
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:, :6] = True
    return mask


def local() -> LatentDifference:
    """The automatic mask that never takes the whole picture: random weights change a little everywhere."""
    return LatentDifference(everywhere_ratio=1.0)


def assert_outside_follows(edit: Edit, base: Generation, first: int = 0) -> None:
    outside = ~edit.mask
    for step in range(first, len(base.latents)):
        assert torch.equal(edit.latents[step][..., outside], base.latents[step][..., outside]), step


def test_generation_is_the_stock_pipeline_run(pinned_editor: Editor, generate: Generate) -> None:
    base = generate()
    pinned_editor.close()
    stock = pinned_editor.pipe(
        "a cat",
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        generator=torch.Generator("cpu").manual_seed(3),
    ).images[0]
    assert np.array_equal(np.asarray(base.image), np.asarray(stock))
    assert len(base.latents) == base.recording.num_calls == STEPS


def test_initial_latents_are_what_the_unet_saw_first(generate: Generate) -> None:
    base = generate()
    assert torch.equal(base.initial_latents[0], base.recording.samples[0][0])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_drawn_mask_pins_every_step(scheduler: str, pinned_editor: Editor, generate: Generate) -> None:
    pinned_editor.pipe.scheduler = getattr(diffusers, scheduler)(**SCHEDULERS[scheduler])
    base = generate()
    edit = pinned_editor.edit(base, "a dog", mask=left_half())
    assert torch.equal(edit.mask, left_half())
    assert edit.unchanged_outside
    assert_outside_follows(edit, base)
    assert edit.report.restored_steps == 0
    assert edit.report.dense_calls == 0
    assert edit.report.sparse_calls == base.recording.num_calls
    assert not torch.equal(edit.latents[-1][..., left_half()], base.latents[-1][..., left_half()])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_automatic_mask_runs_densely_then_follows(scheduler: str, pinned_editor: Editor, generate: Generate) -> None:
    pinned_editor.pipe.scheduler = getattr(diffusers, scheduler)(**SCHEDULERS[scheduler])
    base = generate()
    edit = pinned_editor.edit(base, "a dog", mask=local(), dense_calls=2)
    assert edit.report.mask_source == "latent-difference"
    assert edit.report.dense_calls == 2
    assert edit.report.sparse_calls == base.recording.num_calls - 2
    assert 0 < edit.report.area < 1
    assert_outside_follows(edit, base, first=1)
    assert not torch.equal(edit.latents[0], base.latents[0])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("second_mask", ["drawn", "automatic"])
def test_edit_of_an_automatic_edit(scheduler: str, second_mask: str, pinned_editor: Editor, generate: Generate) -> None:
    pinned_editor.pipe.scheduler = getattr(diffusers, scheduler)(**SCHEDULERS[scheduler])
    first = pinned_editor.edit(generate(), "a dog", mask=local(), dense_calls=2)
    mask = left_half() if second_mask == "drawn" else local()
    second = pinned_editor.edit(first, "a dog, red background", mask=mask, dense_calls=3)
    assert second.base is first
    assert_outside_follows(second, first, first=0 if second_mask == "drawn" else 2)
    third = pinned_editor.edit(second, "a fox", mask=~left_half())
    assert_outside_follows(third, second)


def test_dense_run_is_the_stock_run_of_the_new_prompt(pinned_editor: Editor, generate: Generate) -> None:
    base = generate()
    dense = pinned_editor.dense(base, "a dog")
    other = generate("a dog")
    assert torch.equal(dense.latents, other.latents[-1])
    assert len(dense.call_seconds) == STEPS
    assert dense.ms > 0
    assert pinned_editor.pipe.unet is pinned_editor.compiled


def test_full_mask_is_the_dense_run(pinned_editor: Editor, generate: Generate) -> None:
    base = generate()
    edit = pinned_editor.edit(base, "a dog", mask=torch.ones(16, 16, dtype=torch.bool))
    assert torch.equal(edit.latents[-1], pinned_editor.dense(base, "a dog").latents)


@pytest.mark.parametrize("kind", ["latent", "image", "numpy", "pil", "path", "str"])
def test_masks_of_every_kind(kind: str, pinned_editor: Editor, generate: Generate, tmp_path: Path) -> None:
    mask = left_half()
    pixels = mask.repeat_interleave(2, 0).repeat_interleave(2, 1)
    image = Image.fromarray(pixels.numpy().astype(np.uint8) * 255)
    image.save(tmp_path / "mask.png")
    forms: dict[str, Any] = {
        "latent": mask,
        "image": pixels[None, None].float(),
        "numpy": pixels.numpy(),
        "pil": image,
        "path": tmp_path / "mask.png",
        "str": str(tmp_path / "mask.png"),
    }
    edit = pinned_editor.edit(generate(), "a dog", mask=forms[kind])
    assert torch.equal(edit.mask, mask)


def test_same_prompt_returns_the_base_without_a_run(pinned_editor: Editor, generate: Generate) -> None:
    base = generate()
    pinned_editor.pipe.unet.original = None
    edit = pinned_editor.edit(base, "a cat")
    assert edit.image is base.image
    assert edit.unchanged_outside
    assert edit.report.calls == ()
    assert "nothing was run" in str(edit.report)


@pytest.mark.parametrize(("before", "after"), [("", "a dog"), ("a cat", ""), ("", "")])
def test_empty_prompts_are_prompts(before: str, after: str, pinned_editor: Editor, generate: Generate) -> None:
    """An empty prompt asks for nothing in particular; two of them are the same prompt."""
    base = generate(before)
    edit = pinned_editor.edit(base, after, mask=masks.box_mask(16, 16, (0.2, 0.2, 0.7, 0.7)))
    assert edit.unchanged_outside
    assert (edit.image is base.image) == (before == after)
    if before != after:
        assert not torch.equal(edit.latents[-1], base.latents[-1])


def test_empty_mask_returns_the_base_without_a_run(pinned_editor: Editor, generate: Generate) -> None:
    base = generate()
    pinned_editor.pipe.unet.original = None
    edit = pinned_editor.edit(base, "a dog", mask=torch.zeros(16, 16, dtype=torch.bool))
    assert edit.image is base.image
    assert edit.recording is base.recording
    assert not edit.mask.any()


def test_a_change_of_the_whole_picture_is_the_dense_run(pinned_editor: Editor, generate: Generate) -> None:
    base = generate()
    edit = pinned_editor.edit(base, "a dog", mask=LatentDifference(everywhere_ratio=0.0), dense_calls=2)
    assert edit.mask.all()
    assert edit.report.dense_calls == STEPS
    assert "whole picture" in edit.report.note
    assert torch.equal(edit.latents[-1], pinned_editor.dense(base, "a dog").latents)
    assert pinned_editor.edit(edit, "a fox", mask=left_half()).unchanged_outside


@pytest.mark.parametrize(("mask", "calls"), [(None, 1), ("latent-difference", 3)])
def test_prompts_that_mean_the_same_end_after_the_dense_calls(
    mask: str | None, calls: int, pinned_editor: Editor, generate: Generate
) -> None:
    base = generate("a cat")
    edit = pinned_editor.edit(base, "a  cat", mask=mask, dense_calls=3)
    assert edit.image is base.image
    assert edit.report.area == 0
    assert edit.report.dense_calls == calls
    assert edit.report.detection is not None and edit.report.detection.steps == calls
    assert edit.report.threshold is None
    assert pinned_editor.edit(base, "a dog", mask=left_half()).unchanged_outside


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("mask", [None, local(), left_half()])
def test_an_interrupted_edit_leaves_everything_usable(
    error: type[BaseException],
    mask: torch.Tensor | LatentDifference | None,
    pinned_editor: Editor,
    generate: Generate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = generate()
    expected = pinned_editor.edit(base, "a dog", mask=mask, dense_calls=2)
    original = pinned_editor.pipe.unet.original
    calls = 0

    def fail_at_the_fifth(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise error

    handle = original.register_forward_pre_hook(fail_at_the_fifth)
    with pytest.raises(error):
        pinned_editor.edit(base, "a dog", mask=mask, dense_calls=2)
    handle.remove()
    again = pinned_editor.edit(base, "a dog", mask=mask, dense_calls=2)
    assert torch.equal(again.latents[-1], expected.latents[-1])


def test_an_interrupted_dense_run_puts_the_compiled_unet_back(pinned_editor: Editor, generate: Generate) -> None:
    base = generate()
    compiled = pinned_editor.pipe.unet

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = compiled.original.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        pinned_editor.dense(base, "a dog")
    handle.remove()
    assert pinned_editor.pipe.unet is compiled
    assert not compiled.original._forward_hooks


def test_negative_prompt_and_size_reach_the_edit(pinned_editor: Editor, generate: Generate) -> None:
    base = generate(negative_prompt="a fox", height=32, width=48)
    assert base.image.size == (48, 32)
    edit = pinned_editor.edit(base, "a dog", mask=local(), dense_calls=2)
    assert edit.negative_prompt == "a fox"
    assert edit.image.size == (48, 32)
    assert edit.mask.shape == (16, 24)
    changed = pinned_editor.edit(base, "a cat", negative_prompt="a dog", mask=local(), dense_calls=2)
    assert changed.report.sparse_calls > 0


def test_without_guidance(pinned_editor: Editor, generate: Generate) -> None:
    base = generate(guidance_scale=1.0)
    assert base.recording.samples[0].shape[0] == 1
    assert pinned_editor.edit(base, "a dog", mask=left_half()).unchanged_outside


def test_close_puts_the_unet_back(tiny_pipe: Any, pinned_editor: Editor, generate: Generate) -> None:
    base = generate()
    original = pinned_editor.compiled.original
    assert tiny_pipe.unet is pinned_editor.compiled
    pinned_editor.close()
    pinned_editor.close()
    assert tiny_pipe.unet is original
    with pytest.raises(ModeError, match="closed"):
        pinned_editor.edit(base, "a dog")


def test_a_replaced_unet_is_noticed(tiny_pipe: Any, pinned_editor: Editor, generate: Generate) -> None:
    base = generate()
    tiny_pipe.unet = pinned_editor.compiled.original
    with pytest.raises(ModeError, match="replaced"):
        pinned_editor.edit(base, "a dog")


def test_an_editor_of_a_compiled_pipeline_uses_it(tiny_pipe: Any, pinned_editor: Editor, generate: Generate) -> None:
    base = generate()
    second = Editor(tiny_pipe)
    assert second.compiled is pinned_editor.compiled
    assert second.edit(base, "a dog", mask=left_half()).unchanged_outside
    assert torch.equal(second.dense(base, "a cat").latents, base.latents[-1])
    second.close()
    assert tiny_pipe.unet is pinned_editor.compiled


@pytest.mark.parametrize("progress", [True, False, None])
def test_progress_settings_of_the_pipeline_survive(
    progress: bool | None,
    tiny_pipe: Any,
    pinned_editor: Editor,
    generate: Generate,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pinned_editor.progress = progress
    generate()
    assert ("generate" in capfd.readouterr().err) == bool(progress)
    assert tiny_pipe._progress_bar_config == {"disable": True}


def test_show_draws_a_figure(pinned_editor: Editor, generate: Generate, tmp_path: Path) -> None:
    edit = pinned_editor.edit(generate(), "a dog", mask=local(), dense_calls=2)
    edit.show().savefig(tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").width > 500
    text = str(edit.report)
    assert "2 calls" in text
    assert f"{STEPS - 2} calls" in text
