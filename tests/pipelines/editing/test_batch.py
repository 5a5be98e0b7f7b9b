"""``Editor.edit_many``: several prompts of one base in one run, on a tiny random pipeline with the real compiler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from fisedit_compiler import SparsifyConfig
from fisedit_compiler.errors import ConfigError, FiseditError, MaskError, PromptError, RecordingError
from fisedit_compiler.geometry.site_plan import SitePlan
from fisedit_compiler.kernels.tolerances import assert_close
from fisedit_compiler.pipelines import DetectedMask, Edit, Editor, Generation, LatentDifference
from fisedit_compiler.pipelines.editing.batch import EVERYWHERE
from tests.pipelines.editing.test_following import Sampled
from tests.reference.pinned import PinnedRun
from tests.support.tiny_pipeline import make_tiny_pipeline

STEPS = 5
PROMPTS = ("a dog", "a fox", "a cat under fireworks")


@pytest.fixture(scope="module")
def editor() -> Iterator[Editor]:
    with Editor(make_tiny_pipeline(), SparsifyConfig(dense_above=1.0)) as editor:
        yield editor


@pytest.fixture(scope="module")
def base(editor: Editor) -> Generation:
    return editor.generate("a cat", seed=3, num_inference_steps=STEPS)


def box(top: int, left: int, bottom: int, right: int) -> Tensor:
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


ONE = box(2, 2, 9, 10)
EACH = (ONE, box(8, 6, 14, 15), box(0, 0, 4, 4))


@contextmanager
def unet_batches(editor: Editor) -> Iterator[list[int]]:
    """The batch of every call of the UNet."""
    batches: list[int] = []
    compiled = editor.compiled
    handle = compiled.register_forward_pre_hook(lambda _, args: batches.append(args[0].shape[0]))
    try:
        yield batches
    finally:
        handle.remove()


def assert_kept_outside(edit: Edit, base: Generation, first: int = 0) -> None:
    for step in range(first, len(base.latents)):
        assert torch.equal(edit.latents[step][..., ~edit.mask], base.latents[step][..., ~edit.mask]), step


def test_every_picture_gets_the_noise_of_the_bases_sampler(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(editor.pipe, "scheduler", Sampled())
    base = editor.generate("a cat", seed=3, num_inference_steps=STEPS)
    edits = editor.edit_many(base, PROMPTS, mask=ONE)
    for edit, prompt in zip(edits, PROMPTS, strict=True):
        assert edit.report.restored_steps == 0
        assert_close(edit.latents[-1], editor.edit(base, prompt, mask=ONE).latents[-1], torch.float32)


@pytest.mark.parametrize(
    "scheduler", ["DDIMScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
def test_one_mask_gives_the_edits_one_by_one(scheduler: str, editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ancestral schedulers draw noise at every step: every image draws the base's."""
    given = editor.pipe.scheduler
    monkeypatch.setattr(editor.pipe, "scheduler", getattr(diffusers, scheduler).from_config(given.config))
    base = editor.generate("a cat", seed=3, num_inference_steps=STEPS)
    with unet_batches(editor) as batches:
        edits = editor.edit_many(base, PROMPTS, mask=ONE)
    assert batches == [2 * len(PROMPTS)] * STEPS, "one call of the UNet per step"
    assert len(editor.compiled.programs) == 1, "and one program"
    for prompt, edit in zip(PROMPTS, edits, strict=True):
        alone = editor.edit(base, prompt, mask=ONE)
        assert edit.prompt == prompt and edit.base is base and torch.equal(edit.mask, ONE)
        assert edit.unchanged_outside
        assert_kept_outside(edit, base)
        for latents, expected in zip(edit.latents, alone.latents, strict=True):
            assert latents.shape == expected.shape
            # Latents of Euler schedulers are scaled by sigma, rounding with them.
            assert float((latents - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
        assert np.abs(np.asarray(edit.image, float) - np.asarray(alone.image, float)).max() <= 1
        assert edit.recording is not None and alone.recording is not None
        own = sum(one.own_nbytes for one in edit.recordings.values())
        assert own == sum(one.own_nbytes for one in alone.recordings.values()) == edit.report.own_bytes > 0
        assert edit.report.sparse_calls == STEPS and edit.report.restored_steps == 0


def test_masks_of_their_own_are_the_pinned_program_of_the_union(editor: Editor, base: Generation) -> None:
    """The first call: what the UNet returned for each prompt is the reference's within its mask."""
    calls: list[tuple[Any, Any, Tensor]] = []
    handle = editor.compiled.register_forward_hook(
        lambda _, args, kwargs, output: calls.append((args, kwargs, output[0])), with_kwargs=True
    )
    edits = editor.edit_many(base, PROMPTS, mask=EACH)
    editor.generate("a cat", seed=3, num_inference_steps=STEPS)
    handle.remove()
    (args, kwargs, output), (base_args, base_kwargs, _) = calls[0], calls[STEPS]
    count, text = len(PROMPTS), kwargs["encoder_hidden_states"]
    first = {"sample": base_args[0], "timestep": base_args[1]}
    assert torch.equal(args[0], base_args[0].repeat_interleave(count, 0)), "the same noise for all"
    oracle = PinnedRun(
        editor.compiled.original, {**first, "encoder_hidden_states": base_kwargs["encoder_hidden_states"]}
    )
    (program,) = editor.compiled.programs
    plan = SitePlan.build(torch.stack(EACH).any(dim=0), program.levels, program.convs)
    active = {plan.size(level): plan.active_mask(level) for level in plan.active}
    for number, (edit, mask) in enumerate(zip(edits, EACH, strict=True)):
        expected = oracle.replay({**first, "encoder_hidden_states": text[number::count]}, active)
        expected = torch.where(mask, expected, oracle.base_output)
        assert_close(output[number::count], expected, torch.float32)
        assert torch.equal(edit.mask, mask) and edit.unchanged_outside
        assert_kept_outside(edit, base)
        assert not torch.equal(edit.latents[-1], base.latents[-1])


def test_every_edit_can_be_edited_further(editor: Editor, base: Generation) -> None:
    edits = editor.edit_many(base, PROMPTS, mask=EACH)
    for edit, mask in zip(edits, EACH, strict=True):
        again = editor.edit(edit, "a bird", mask=~mask)
        assert again.base is edit and again.unchanged_outside
        assert_kept_outside(again, edit)
    further = editor.edit_many(edits[1], ["a bird", "a panda"], mask=box(5, 5, 12, 12))
    assert all(edit.base is edits[1] and edit.unchanged_outside for edit in further)
    unrecorded = editor.edit_many(base, PROMPTS[:1], mask=ONE, record=False)[0]
    assert unrecorded.recording is None and unrecorded.report.own_bytes == 0
    with pytest.raises(RecordingError, match="record=True"):
        editor.edit_many(unrecorded, PROMPTS, mask=ONE)


def test_what_changes_nothing_is_not_run(editor: Editor, base: Generation) -> None:
    masks = [EACH[0], EACH[1], torch.zeros_like(ONE), EACH[2]]
    with unet_batches(editor) as batches:
        edits = editor.edit_many(base, ["a dog", "a cat", "a fox", "a bird"], mask=masks)
    assert batches == [4] * STEPS, "two of four prompts are left"
    assert [edit.image is base.image for edit in edits] == [False, True, True, False]
    assert edits[1].recording is base.recording and edits[1].report.calls == ()
    assert "prompts are the base's" in edits[1].report.note and "mask is empty" in edits[2].report.note
    assert [len(edit.report.calls) for edit in edits] == [STEPS, 0, 0, STEPS]
    with unet_batches(editor) as batches:
        edits = editor.edit_many(base, ["a cat"] * 2)
    assert batches == [] and all(edit.image is base.image for edit in edits)


def test_every_edit_has_its_share_of_the_time(editor: Editor, base: Generation) -> None:
    edits = editor.edit_many(base, PROMPTS, mask=ONE)
    assert len({edit.report.calls for edit in edits}) == 1
    (one,) = editor.edit_many(base, PROMPTS[:1], mask=ONE)
    assert one.report.sparse_calls == STEPS and one.unchanged_outside
    called = sum(seconds for edit in edits for _, seconds in edit.report.calls)
    assert called <= sum(edit.report.wall_seconds for edit in edits)


# -- automatic masks -------------------------------------------------------------------------------------------------


def local() -> LatentDifference:
    """The automatic mask that never takes the whole picture: random weights change a little everywhere."""
    return LatentDifference(everywhere_ratio=1.0)


def test_every_prompt_gets_a_mask_of_its_own(editor: Editor, base: Generation) -> None:
    with unet_batches(editor) as batches:
        edits = editor.edit_many(base, PROMPTS, mask=local(), dense_calls=2)
    assert batches == [2 * len(PROMPTS)] * STEPS
    for prompt, edit in zip(PROMPTS, edits, strict=True):
        alone = editor.edit(base, prompt, mask=local(), dense_calls=2)
        assert torch.equal(edit.mask, alone.mask), "the dense calls are those of the edit alone"
        assert edit.report.mask_source == "latent-difference"
        assert edit.report.threshold == pytest.approx(alone.report.threshold, rel=1e-3)
        assert edit.report.dense_calls == 2 and edit.report.sparse_calls == STEPS - 2
        assert edit.heat is not None and edit.unchanged_outside
        assert_kept_outside(edit, base, first=1)
        assert editor.edit(edit, "a bird", mask=~edit.mask).unchanged_outside


def found(masks: Sequence[Tensor | None]) -> list[Any]:
    """Rules that find these masks, ``None`` for everywhere."""

    class Rule(LatentDifference):
        def fresh(self) -> LatentDifference:
            return self

        def detect(self) -> DetectedMask:
            mask = masks[rules.index(self)]
            heat = torch.ones(16, 16)
            if mask is None:
                return DetectedMask(torch.ones_like(ONE), 0.5, heat, everywhere=True)
            return DetectedMask(mask, 0.5, heat)

        def __eq__(self, other: object) -> bool:
            return self is other

    rules = [Rule() for _ in masks]
    return rules


def test_prompts_whose_latents_do_not_part_return_the_base(editor: Editor, base: Generation) -> None:
    edits = editor.edit_many(base, PROMPTS, mask=found([EACH[0], torch.zeros_like(ONE), EACH[1]]), dense_calls=2)
    assert [edit.image is base.image for edit in edits] == [False, True, False]
    assert edits[1].recording is base.recording and edits[1].report.dense_calls == 2
    assert edits[0].unchanged_outside and edits[2].unchanged_outside
    with unet_batches(editor) as batches:
        edits = editor.edit_many(base, PROMPTS, mask=found([torch.zeros_like(ONE)] * 3), dense_calls=2)
    assert len(batches) == 2, "the run ends when nothing is left to edit"
    assert all(edit.image is base.image and "do not differ" in edit.report.note for edit in edits)


def test_prompts_that_change_everything_are_the_dense_run(editor: Editor, base: Generation) -> None:
    edits = editor.edit_many(base, PROMPTS, mask=found([EACH[0], None, EACH[1]]), dense_calls=2)
    dense = editor.dense(base, PROMPTS[1]).latents
    torch.testing.assert_close(edits[1].latents[-1], dense, rtol=1e-4, atol=1e-4)
    assert bool(edits[1].mask.all()) and "whole picture" in edits[1].report.note
    for edit in (edits[0], edits[2]):
        assert edit.unchanged_outside and edit.report.note == EVERYWHERE
        assert edit.report.dense_calls == STEPS
    edits = editor.edit_many(base, PROMPTS, mask=found([None] * 3), dense_calls=2)
    for prompt, edit in zip(PROMPTS, edits, strict=True):
        torch.testing.assert_close(edit.latents[-1], editor.dense(base, prompt).latents, rtol=1e-4, atol=1e-4)
        assert edit.recording is not None and editor.edit(edit, "a bird", mask=ONE).unchanged_outside


# -- mistakes --------------------------------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[Any, dict[str, Any], type[FiseditError], str]] = {
    "no prompts": ([], {}, PromptError, "no prompts"),
    "a string": ("a dog", {}, PromptError, "takes a list of prompts, got one string"),
    "a number": (3, {}, PromptError, "got an object of type int"),
    "a prompt that is none": (["a dog", 3], {}, PromptError, "the prompt is of type int"),
    "a long prompt": (["a cat " * 20], {}, PromptError, "shorten|Shorten"),
    "negative prompt": (["a dog"], {"negative_prompt": 3}, PromptError, "negative prompt"),
    "fewer masks": (PROMPTS, {"mask": EACH[:2]}, MaskError, "2 masks were given for 3 prompts"),
    "a stack of fewer": (PROMPTS, {"mask": torch.stack(EACH[:2])}, MaskError, "2 masks were given for 3 prompts"),
    "more masks": (PROMPTS[:1], {"mask": list(EACH)}, MaskError, "3 masks were given for 1 prompt;"),
    "some masks": (PROMPTS, {"mask": [ONE, None, ONE]}, MaskError, "some prompts have a mask and others none"),
    "size": (PROMPTS, {"mask": [ONE, ONE, ONE[:5]]}, MaskError, "16 x 16"),
    "dense calls": (PROMPTS, {"dense_calls": STEPS}, ConfigError, f"{STEPS} steps"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named_before_anything_runs(name: str, editor: Editor, base: Generation) -> None:
    prompts, options, error, message = MISTAKES[name]
    with unet_batches(editor) as batches, pytest.raises(error, match=message):
        editor.edit_many(base, prompts, **options)
    assert batches == []


def test_an_interrupted_run_leaves_everything_usable(editor: Editor, base: Generation) -> None:
    expected = editor.edit_many(base, PROMPTS, mask=EACH)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = editor.compiled.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        editor.edit_many(base, PROMPTS, mask=EACH)
    handle.remove()
    again = editor.edit_many(base, PROMPTS, mask=EACH)
    assert all(torch.equal(now.latents[-1], then.latents[-1]) for now, then in zip(again, expected, strict=True))


def test_a_changed_scheduler_is_refused(editor: Editor, base: Generation, monkeypatch: pytest.MonkeyPatch) -> None:
    config = editor.pipe.scheduler.config
    monkeypatch.setattr(editor.pipe, "scheduler", diffusers.EulerDiscreteScheduler.from_config(config))
    with pytest.raises(RecordingError, match="EulerDiscreteScheduler"):
        editor.edit_many(base, PROMPTS)


def test_stacks_and_negative_prompts(editor: Editor) -> None:
    base = editor.generate("a cat", seed=5, num_inference_steps=3, negative_prompt="a fox", guidance_scale=4.0)
    edits = editor.edit_many(base, PROMPTS, mask=torch.stack(EACH), negative_prompt="a dog")
    for prompt, mask, edit in zip(PROMPTS, EACH, edits, strict=True):
        assert edit.negative_prompt == "a dog" and torch.equal(edit.mask, mask) and edit.unchanged_outside
        assert edit.prompt == prompt
    same = editor.edit_many(base, ["a cat", "a dog"], mask=ONE)
    assert same[0].image is base.image and same[1].negative_prompt == "a fox"


def test_without_guidance(editor: Editor) -> None:
    base = editor.generate("a cat", seed=5, num_inference_steps=3, guidance_scale=1.0)
    with unet_batches(editor) as batches:
        edits = editor.edit_many(base, PROMPTS, mask=EACH)
    assert batches == [3] * 3 and all(edit.unchanged_outside for edit in edits)
