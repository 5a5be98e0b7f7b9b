"""The Editor drives other stock pipelines too, with the real compiler: SDXL's, ControlNet's and inpainting."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from fisedit_compiler import Editor, masks
from fisedit_compiler.errors import ConfigError, RecordingError
from fisedit_compiler.pipelines.detectors import LatentDifference
from tests.support.tiny_pipeline import PICTURE, controlnet, inpaint, make_tiny_pipeline, sdxl

STEPS = 4
BASE, EDIT = "a cat on a desk", "a dog on a desk"
MASK = masks.box_mask(16, 16, (0.2, 0.2, 0.7, 0.7))


@cache
def prepared(name: str) -> tuple[Editor, dict[str, Any]]:
    make = {"sdxl": sdxl, "controlnet": controlnet, "inpaint": inpaint, "inpaint of nine channels": lambda: inpaint(9)}
    pipe, options = make[name]()
    pipe.set_progress_bar_config(disable=True)
    return Editor(pipe).prepare(), options


PIPELINES = pytest.mark.parametrize("name", ["sdxl", "controlnet", "inpaint", "inpaint of nine channels"])


@PIPELINES
def test_edits_keep_the_base_outside_and_a_full_mask_is_the_dense_run(name: str) -> None:
    editor, options = prepared(name)
    base = editor.generate(BASE, seed=3, num_inference_steps=STEPS, options=options)
    edit = editor.edit(base, EDIT, mask=MASK)
    assert edit.unchanged_outside and not torch.equal(edit.latents[-1], base.latents[-1])
    again = editor.edit(edit, "a dog on a chair", mask=MASK)
    assert again.unchanged_outside
    full = editor.edit(base, EDIT, mask=torch.ones(16, 16, dtype=torch.bool))
    dense = editor.dense(base, EDIT)
    torch.testing.assert_close(full.latents[-1], dense.latents, rtol=1e-4, atol=1e-4)


@PIPELINES
def test_a_base_knows_what_its_run_started_from(name: str) -> None:
    """Inpainting draws from the generator before the noise, to encode its picture."""
    editor, options = prepared(name)
    seen: list[torch.Tensor] = []
    hook = editor.compiled.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    try:
        base = editor.generate(BASE, seed=3, num_inference_steps=STEPS, options=options)
    finally:
        hook.remove()
    assert torch.equal(base.initial_latents, seen[0][:1, :4]), "DDIM does not scale what the UNet gets"
    assert editor.pipe.prepare_latents.__func__ is type(editor.pipe).prepare_latents, "the pipeline is as it was"


@PIPELINES
def test_masks_are_found_and_maps_reused(name: str) -> None:
    editor, options = prepared(name)
    base = editor.generate(BASE, seed=3, num_inference_steps=STEPS, options=options, maps=2)
    edit = editor.edit(base, EDIT, mask=LatentDifference(everywhere_ratio=1.0), dense_calls=2)
    assert edit.unchanged_outside
    assert (edit.report.dense_calls, edit.report.sparse_calls) == (2, STEPS - 2)


@pytest.mark.parametrize("name", ["sdxl", "controlnet"])
def test_several_edits_in_one_run_are_the_edits_one_by_one(name: str) -> None:
    editor, options = prepared(name)
    base = editor.generate(BASE, seed=3, num_inference_steps=STEPS, options=options)
    prompts = [EDIT, "a fish on a desk"]
    for prompt, edit in zip(prompts, editor.edit_many(base, prompts, mask=MASK), strict=True):
        assert edit.unchanged_outside
        alone = editor.edit(base, prompt, mask=MASK)
        torch.testing.assert_close(edit.latents[-1], alone.latents[-1], rtol=1e-4, atol=1e-4)


def test_several_edits_in_one_run_of_inpainting_are_refused() -> None:
    """That pipeline encodes its picture with the first generator only, so the others draw other noise."""
    editor, options = prepared("inpaint")
    base = editor.generate(BASE, seed=3, num_inference_steps=STEPS, options=options)
    with pytest.raises(RecordingError, match="At call 0 the input differs from the recorded one outside the mask"):
        editor.edit_many(base, [EDIT, "a fish on a desk"], mask=MASK)


@pytest.mark.parametrize("name", ["sdxl", "controlnet"])
def test_pictures_are_loaded(name: str) -> None:
    editor, options = prepared(name)
    loaded = editor.load(PICTURE, BASE, num_inference_steps=STEPS, options=options)
    edit = editor.edit(loaded, EDIT, mask=MASK)
    assert edit.unchanged_outside and loaded.image.tobytes() == PICTURE.tobytes()


def test_edits_repeat_the_options_of_their_base() -> None:
    editor, options = prepared("controlnet")
    other = {**options, "image": PICTURE.rotate(90)}
    bases = [editor.generate(BASE, seed=3, num_inference_steps=STEPS, options=each) for each in (options, other)]
    assert not torch.equal(bases[0].latents[-1], bases[1].latents[-1])
    for base in bases:
        full = editor.edit(base, EDIT, mask=torch.ones(16, 16, dtype=torch.bool))
        torch.testing.assert_close(full.latents[-1], editor.dense(base, EDIT).latents, rtol=1e-4, atol=1e-4)
        assert editor.edit(base, EDIT, mask=MASK).settings.options == base.settings.options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_skp": 1}, "StableDiffusionControlNetPipeline takes no such argument; did you mean 'clip_skip'"),
        ({"latents": None}, "its 'latents' itself; pass seed= beside options, or start from a picture"),
        ({"height": 64}, "the Editor gives the pipeline its 'height' itself; pass height= beside options"),
        ({"callback_on_step_end": print}, "`latents`; for a callback of your own run the pipeline itself inside"),
        ({"num_images_per_prompt": 2}, "one picture of one prompt"),
    ],
)
def test_wrong_options_are_named_before_anything_runs(options: dict[str, Any], message: str) -> None:
    editor, given = prepared("controlnet")
    with pytest.raises(ConfigError, match=message):
        editor.generate(BASE, seed=3, options={**given, **options})


def test_a_pipeline_that_starts_from_a_picture_is_refused() -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    parts = make_tiny_pipeline().components
    pipe = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    with pytest.raises(ConfigError, match=r"takes no 'height', 'width', 'latents'.*Editor\.load"):
        Editor(pipe)


def test_a_pipeline_that_passes_everything_on_is_driven() -> None:
    from diffusers import StableDiffusionPipeline

    class Wrapped(StableDiffusionPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    pipe = Wrapped(**make_tiny_pipeline().components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    with Editor(pipe) as editor:
        base = editor.generate(BASE, seed=3, num_inference_steps=STEPS, options={"eta": 0.5})
        assert editor.edit(base, EDIT, mask=MASK).unchanged_outside
