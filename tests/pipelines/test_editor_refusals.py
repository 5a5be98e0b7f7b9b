"""What the Editor refuses before a run, each with its remedy, on a tiny random pipeline."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from fisedit_compiler.errors import ConfigError, MaskError, PromptError, RecordingError
from fisedit_compiler.pipelines import Editor
from tests.pipelines.test_editor import STEPS, Generate, left_half


def test_edit_without_recording_cannot_be_edited(pinned_editor: Editor, generate: Generate) -> None:
    edit = pinned_editor.edit(generate(), "a dog", mask=left_half(), record=False)
    with pytest.raises(RecordingError, match="record=True"):
        pinned_editor.edit(edit, "a fox")


@pytest.mark.parametrize(
    "option", [{"seed": 4}, {"num_inference_steps": 8}, {"guidance_scale": 3.0}, {"dense_calls": 0}]
)
def test_options_that_are_not_the_bases_are_refused(
    option: dict[str, Any], pinned_editor: Editor, generate: Generate
) -> None:
    base = generate()
    with pytest.raises(ConfigError, match=next(iter(option))):
        pinned_editor.edit(base, "a dog", **option)
    same = {"seed": 3, "num_inference_steps": STEPS, "guidance_scale": 5.0}
    pinned_editor.edit(base, "a dog", mask=left_half(), **same)


@pytest.mark.parametrize(
    ("option", "remedy"),
    [
        ({"seed": "7"}, "seed='7' is no whole number.*seed=7"),
        ({"seed": 7.5}, "seed=7.5 is no whole number"),
        ({"seed": -1}, "seed=-1 must be 0 or more"),
        ({"seed": 2**64}, "below 2"),
        ({"seed": True}, "seed=True is no whole number"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 must be 1 or more"),
        ({"num_inference_steps": -1}, "num_inference_steps=-1 must be 1 or more"),
        ({"num_inference_steps": 4.5}, "num_inference_steps=4.5 is no whole number"),
        ({"guidance_scale": "high"}, "guidance_scale='high' is no number"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan is not finite"),
        ({"height": 0}, "height=0 must be 1 or more"),
        ({"width": "64"}, "width='64' is no whole number"),
        ({"height": 20}, "height=20 is no size of this pipeline's pictures: pass a multiple of 8"),
    ],
)
def test_settings_that_are_no_numbers_of_their_kind_are_refused(
    option: dict[str, Any], remedy: str, pinned_editor: Editor
) -> None:
    with pytest.raises(ConfigError, match=remedy):
        pinned_editor.generate("a cat", **{"seed": 3, "num_inference_steps": STEPS, **option})


def test_a_size_that_no_picture_has_is_not_prepared_for(pinned_editor: Editor) -> None:
    with pytest.raises(ConfigError, match="width=20 is no size"):
        pinned_editor.prepare(width=20)


@pytest.mark.parametrize("wrong", ["its image", "a prompt", "nothing"])
def test_what_is_no_generation_is_refused(wrong: str, pinned_editor: Editor, generate: Generate) -> None:
    base: Any = {"its image": generate().image, "a prompt": "a cat", "nothing": None}[wrong]
    for call in (
        lambda: pinned_editor.edit(base, "a dog"),
        lambda: pinned_editor.edit_many(base, ["a dog"]),
        lambda: pinned_editor.dense(base, "a dog"),
    ):
        with pytest.raises(ConfigError, match=rf"got an object of type {type(base).__name__}; pass `base` itself"):
            call()


def test_too_many_dense_calls_are_refused(pinned_editor: Editor, generate: Generate) -> None:
    with pytest.raises(ConfigError, match=f"{STEPS} steps"):
        pinned_editor.edit(generate(), "a dog", dense_calls=STEPS)


def test_changed_scheduler_is_refused(pinned_editor: Editor, generate: Generate) -> None:
    base = generate()
    pipe = pinned_editor.pipe
    given = pipe.scheduler
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(given.config)
    with pytest.raises(RecordingError, match="EulerDiscreteScheduler"):
        pinned_editor.edit(base, "a dog")
    pipe.scheduler = diffusers.DDIMScheduler.from_config(given.config, timestep_spacing="trailing")
    with pytest.raises(RecordingError, match="timestep_spacing 'leading' -> 'trailing'"):
        pinned_editor.edit(base, "a dog")
    pipe.scheduler = diffusers.DDIMScheduler.from_config(given.config)
    assert pinned_editor.edit(base, "a dog", mask=left_half()).unchanged_outside


def test_long_prompt_names_the_words_cut_off(pinned_editor: Editor, generate: Generate) -> None:
    longest = "a cat " * 14 + "under fireworks"
    assert generate(longest).prompt == longest
    prompt = "a cat " * 15 + "under fireworks"
    with pytest.raises(PromptError, match=r"32.*fireworks"):
        generate(prompt)
    base = generate()
    with pytest.raises(PromptError, match="the prompt"):
        pinned_editor.edit(base, prompt)
    with pytest.raises(PromptError, match="negative prompt"):
        pinned_editor.edit(base, "a dog", negative_prompt=prompt)
    with pytest.raises(PromptError, match="list"):
        generate(["a cat", "a dog"])


def test_wrong_mask_size_names_both_sizes(pinned_editor: Editor, generate: Generate) -> None:
    with pytest.raises(MaskError, match=r"16 x 16.*32 x 32"):
        pinned_editor.edit(generate(), "a dog", mask=torch.ones(20, 20))


def test_pipelines_without_unet_are_refused() -> None:
    with pytest.raises(ConfigError, match="unet"):
        Editor(object())
