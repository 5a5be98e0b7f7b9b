"""Dense calls of an edit without a mask: samples that are recorded are not computed, and columns of maps are reused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fisedit_compiler import Recording, SparseModule, SparsifyConfig, sparsify
from fisedit_compiler.errors import ConfigError, RecordingError
from fisedit_compiler.kernels.tolerances import assert_close
from fisedit_compiler.pipelines.words import guided_columns, token_columns
from fisedit_compiler.runtime import dense_calls
from fisedit_compiler.runtime.recorded_inputs import FIRST_CALLS
from tests.runtime.compiled import (
    HEIGHT,
    STEPS,
    WIDTH,
    box,
    compiled_model,
    compiled_pipeline,
    denoise,
    other_text,
    run_pipeline,
)
from tests.zoo import TEXT_LENGTH, Inputs

COLUMNS = torch.tensor([0, 1, -1, 2, 3, -1, 6])
MASK = box(4, 6, 11, 15)


@contextmanager
def batches(module: nn.Module) -> Iterator[list[int]]:
    """The batch of every call that the module itself runs."""
    seen: list[int] = []

    def note(_: Any, args: Any, kwargs: Any) -> None:
        seen.append(int((kwargs["sample"] if "sample" in kwargs else args[0]).shape[0]))

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def conditional_changed(inputs: Inputs, seed: int = 1) -> Inputs:
    """Another prompt with the same negative prompt, as guidance lays them out: the first sample stays."""
    text = other_text(inputs, seed)["encoder_hidden_states"]
    text[: len(text) // 2] = inputs["encoder_hidden_states"][: len(text) // 2]
    return {**inputs, "encoder_hidden_states": text}


def guided(module: Any, inputs: Inputs, steps: int = STEPS) -> Tensor:
    """A run with guidance: both samples of a call have the same latents, and what they predict is mixed."""
    sample = inputs["sample"][:1]
    for step in range(steps):
        call = {**inputs, "sample": sample.repeat(2, 1, 1, 1), "timestep": torch.tensor(900 - 100 * step)}
        unconditional, conditional = module(**call)[0].chunk(2)
        sample = sample - 0.1 * (unconditional + 3.0 * (conditional - unconditional))
    return sample


@dataclass
class Run:
    """A base run and what was made of it."""

    compiled: SparseModule
    inputs: Inputs
    recording: Recording


def recorded(name: str = "sd15", batch: int = 2, maps: int = 0, **changed: Any) -> Run:
    model, compiled = compiled_model(name)
    inputs = {**model.make_inputs(batch, HEIGHT, WIDTH), **changed}
    if batch == 2:
        inputs["sample"] = inputs["sample"][:1].repeat(2, 1, 1, 1)
    with compiled.record(maps) as recording:
        (guided if batch == 2 else denoise)(compiled, inputs)
    return Run(compiled, inputs, recording)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize("record", [False, True])
def test_half_of_the_first_call_is_recorded(name: str, record: bool) -> None:
    run = recorded(name)
    changed = conditional_changed(run.inputs)
    if name == "sdxl":
        added = run.inputs["added_cond_kwargs"]
        pooled = torch.cat([added["text_embeds"][:1], added["text_embeds"][1:] + 1])
        changed["added_cond_kwargs"] = {**added, "text_embeds": pooled}
    with batches(run.compiled.original) as seen, run.compiled.edit(run.recording, record=record) as session:
        edited = guided(run.compiled, changed)
    assert session.computed_samples == [1, 2, 2]
    assert [kind for kind, _ in session.timings] == ["dense"] * STEPS
    assert seen == ([] if record else [1, 2, 2]), "with record=True the recording graph runs in the module's stead"
    assert_close(edited, guided(run.compiled.original, changed), torch.float32)


def test_what_is_recorded_is_taken_bit_for_bit() -> None:
    run = recorded()
    changed = conditional_changed(run.inputs)
    with run.compiled.record() as again:
        dense = run.compiled(**run.inputs)[0]
    with run.compiled.edit(again) as session:
        edited = run.compiled(**changed)[0]
    assert torch.equal(edited[0], dense[0]) and not torch.equal(edited[1], dense[1])
    assert session.computed_samples == [1]
    edited.zero_()  # the caller's own
    with run.compiled.edit(again) as session:
        assert torch.equal(run.compiled(**run.inputs)[0], dense)
    assert session.computed_samples == [0] and session.timings[0][0] == "skipped"


def test_a_recorded_edit_is_composed_of_both() -> None:
    run = recorded()
    changed = conditional_changed(run.inputs)
    with run.compiled.record() as whole:
        guided(run.compiled, changed)
    with run.compiled.edit(run.recording, record=True) as session:
        guided(run.compiled, changed)
    assert session.result is not None and session.computed_samples[0] == 1
    assert list(session.result.calls[0].slots) == list(whole.calls[0].slots)
    for name, slot in session.result.calls[0].slots.items():
        assert_close(slot, whole.slot(0, name), torch.float32)
        assert torch.equal(slot[0], run.recording.slot(0, name)[0])
        assert slot.untyped_storage().nbytes() == slot.nbytes
    with run.compiled.edit(session.result, MASK) as session:
        guided(run.compiled, changed)


def test_the_same_prompts_run_nothing() -> None:
    run = recorded()
    with batches(run.compiled.original) as seen, run.compiled.edit(run.recording, record=True) as session:
        guided(run.compiled, run.inputs)
    assert not seen and session.computed_samples == [0] * STEPS
    assert session.result is not None
    assert session.result.own_nbytes == 0
    for now, base in zip(session.result, run.recording, strict=True):
        assert list(now.slots) == list(base.slots)
        assert all(now.slots[name] is slot for name, slot in base.slots.items())


def test_without_guidance_there_is_nothing_to_skip() -> None:
    run = recorded(batch=1)
    with batches(run.compiled.original) as seen, run.compiled.edit(run.recording) as session:
        denoise(run.compiled, other_text(run.inputs))
    assert seen == session.computed_samples == [1] * STEPS


def test_guidance_in_two_calls() -> None:
    """The unconditional call of the first step is recorded; the conditional one and all later ones are not."""
    model, compiled = compiled_model()
    inputs = model.make_inputs(1, HEIGHT, WIDTH)
    negative, prompts = other_text(inputs, 5), (inputs, other_text(inputs, 6))

    def in_two_calls(conditional: Inputs) -> None:
        sample = inputs["sample"]
        for _ in range(2):
            parts = [compiled(**{**text, "sample": sample})[0] for text in (negative, conditional)]
            sample = sample - 0.1 * (parts[0] + 5 * (parts[1] - parts[0]))

    with compiled.record() as recording:
        in_two_calls(prompts[0])
    with compiled.edit(recording) as session:
        in_two_calls(prompts[1])
    assert session.computed_samples == [0, 1, 1, 1]


@pytest.mark.parametrize("sample", [0, 1])
def test_a_changed_negative_prompt_or_latent_is_computed(sample: int) -> None:
    run = recorded()
    for name in ("encoder_hidden_states", "sample"):
        value = run.inputs[name].clone()
        value[sample].view(-1)[3] += 1
        with run.compiled.edit(run.recording) as session:
            first = run.compiled(**{**run.inputs, name: value, "timestep": torch.tensor(900)})[0]
            for step in (800, 700):
                run.compiled(**{**run.inputs, "timestep": torch.tensor(step)})
        assert session.computed_samples[0] == 1, name
        expected = run.compiled.original(**{**run.inputs, name: value, "timestep": torch.tensor(900)})[0]
        assert_close(first, expected, torch.float32)


class Timed(nn.Module):
    """A timestep for every sample, or one for all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.conv(sample) * timestep.reshape(-1, 1, 1, 1)


def test_a_changed_timestep_is_computed() -> None:
    sample = torch.randn(2, 4, 8, 8)
    module = Timed().eval().requires_grad_(False)
    compiled = sparsify(module, SparsifyConfig(cache=False, multiple=1))
    before, after = torch.tensor([900.0, 900.0]), torch.tensor([900.0, 850.0])
    with compiled.record() as recording:
        compiled(sample, before)
    with batches(module) as seen, compiled.edit(recording) as session:
        assert_close(compiled(sample, after), module(sample, after), torch.float32)
    assert session.computed_samples == [1] and seen == [1, 2]
    run = recorded()
    with pytest.raises(RecordingError, match="Call 0 is at timestep 850"), run.compiled.edit(run.recording):
        run.compiled(**{**run.inputs, "timestep": torch.tensor(850)})


def test_images_that_follow_the_base_apart_from_others() -> None:
    """Latents that part are not compared any more, those of other images with them."""
    model, compiled = compiled_model()
    inputs = model.make_inputs(2, HEIGHT, WIDTH)
    with compiled.record() as recording:
        denoise(compiled, inputs)
    with compiled.edit(recording) as session:
        denoise(compiled, conditional_changed(inputs))
    assert session.computed_samples == [1, 1, 2]


def test_a_text_of_another_length_is_computed() -> None:
    run = recorded()
    text = run.inputs["encoder_hidden_states"]
    longer = {**run.inputs, "encoder_hidden_states": torch.cat([text, text[:, :2]], 1)}
    with run.compiled.edit(run.recording, record=True) as session:
        edited = guided(run.compiled, longer)
    assert session.computed_samples == [2] * STEPS
    assert_close(edited, guided(run.compiled.original, longer), torch.float32)


def residuals(inputs: Inputs, seed: int = 0) -> Inputs:
    """As a ControlNet adds them: one for every skip connection and one in the middle."""
    generator = torch.Generator().manual_seed(seed)
    channels = (16, 16, 16, 32, 32, 32)
    scales = (1, 1, 2, 2, 4, 4)
    batch = inputs["sample"].shape[0]

    def residual(count: int, scale: int) -> Tensor:
        return torch.randn(batch, count, HEIGHT // scale, WIDTH // scale, generator=generator) * 0.1

    return {
        **inputs,
        "down_block_additional_residuals": tuple(map(residual, channels, scales)),
        "mid_block_additional_residual": residual(32, 4),
    }


def test_residuals_are_compared_and_cut_too() -> None:
    model, shared = compiled_model()
    compiled = copy.deepcopy(shared)  # these calls need a program of their own
    inputs = residuals(model.make_inputs(2, HEIGHT, WIDTH))
    with compiled.record() as recording:
        guided(compiled, inputs)
    assert [any("residual" in name for name in call.inputs) for call in recording] == [True] * FIRST_CALLS + [False]
    changed = conditional_changed(inputs)
    with compiled.edit(recording) as session:
        edited = guided(compiled, changed)
    assert session.computed_samples == [1, 2, 2]
    assert_close(edited, guided(compiled.original, changed), torch.float32)
    other = dict(changed)
    other["mid_block_additional_residual"] = inputs["mid_block_additional_residual"].clone()
    other["mid_block_additional_residual"][0, 0, 0, 0] += 1
    with compiled.edit(recording) as session:
        guided(compiled, other)
    assert session.computed_samples == [2] * STEPS


def test_nothing_is_compared_after_the_latents_parted(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU comparing waits for the device."""
    calls = []
    real = dense_calls.compare
    monkeypatch.setattr(dense_calls, "compare", lambda *args: calls.append(args) or real(*args))
    run = recorded()
    with run.compiled.edit(run.recording):
        guided(run.compiled, conditional_changed(run.inputs))
    assert len(calls) == 2, "the first call, and the second, at which they differ"


def test_it_can_be_switched_off() -> None:
    model, _ = compiled_model()
    compiled = sparsify(model.module, SparsifyConfig(skip_recorded=False))
    inputs = model.make_inputs(2, HEIGHT, WIDTH)
    with compiled.record() as recording:
        guided(compiled, inputs)
    with compiled.edit(recording) as session:
        assert torch.equal(guided(compiled, inputs), guided(compiled.original, inputs))
    assert session.computed_samples == [2] * STEPS


class Frames(nn.Module):
    """Every sample gets something of the mean of all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, sample: Tensor, text: Tensor) -> Tensor:
        return self.conv(sample) + sample.mean(0, keepdim=True) + text[:, :, None, None]


def test_a_batch_that_cannot_be_cut_is_computed_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = {"sample": torch.randn(2, 4, 8, 8, generator=generator), "text": torch.randn(2, 4, generator=generator)}
    module = Frames().eval().requires_grad_(False)
    compiled = sparsify(module, SparsifyConfig(cache=False, multiple=1), example_inputs=inputs)
    with compiled.record() as recording:
        compiled(**inputs)
    changed = {**inputs, "text": inputs["text"] + torch.tensor([[0.0], [1.0]])}
    with batches(module) as seen, compiled.edit(recording) as session:
        assert torch.equal(compiled(**changed), module(**changed))
    assert session.computed_samples == [2] and seen == [2, 2]
    with compiled.edit(recording) as session:
        compiled(**inputs)
    assert session.computed_samples == [0], "a whole batch that is recorded needs no cutting"


def test_measured_times_are_those_of_whole_calls() -> None:
    run = recorded()
    with run.compiled.edit(run.recording) as session:
        guided(run.compiled, conditional_changed(run.inputs))
    (dense,) = session.measured()
    assert (dense.kind, dense.calls) == ("dense", STEPS - 1)


# -- inputs of a recording -----------------------------------------------------------------------


def test_equal_inputs_are_stored_once_and_nobody_else_writes_to_them() -> None:
    run = recorded()
    first, second, third = run.recording
    assert set(first.inputs) == {"encoder_hidden_states", "timestep"}
    assert first.inputs["encoder_hidden_states"] is second.inputs["encoder_hidden_states"]
    assert [float(call.inputs["timestep"]) for call in run.recording] == [900.0, 800.0, 700.0]
    text = run.inputs["encoder_hidden_states"]
    assert third.inputs["encoder_hidden_states"].data_ptr() != text.data_ptr()
    assert run.recording.input_nbytes == text.nbytes + 3 * 4
    assert first.nbytes == sum(slot.nbytes for slot in first.slots.values()), "inputs are told apart from slots"


def test_inputs_follow_a_caller_that_writes_in_place() -> None:
    model, compiled = compiled_model()
    inputs = model.make_inputs(2, HEIGHT, WIDTH)
    text = inputs["encoder_hidden_states"].clone()
    with compiled.record() as recording:
        compiled(**{**inputs, "encoder_hidden_states": text})
        text += 1
        compiled(**{**inputs, "encoder_hidden_states": text})
    before, after = (call.inputs["encoder_hidden_states"] for call in recording)
    assert torch.equal(before, inputs["encoder_hidden_states"]) and torch.equal(after, text)


def test_an_edit_keeps_its_own_inputs() -> None:
    run = recorded()
    changed = other_text(run.inputs)
    with run.compiled.edit(run.recording, MASK, record=True) as session:
        guided(run.compiled, changed)
    assert session.result is not None
    for call, base in zip(session.result, run.recording, strict=True):
        assert torch.equal(call.inputs["encoder_hidden_states"], changed["encoder_hidden_states"])
        assert call.inputs["timestep"] is base.inputs["timestep"]
    with run.compiled.edit(session.result) as again:
        guided(run.compiled, changed)
    assert again.computed_samples == [0] * STEPS


# -- maps ----------------------------------------------------------------------------------------


def test_the_first_calls_store_their_maps() -> None:
    run, without = recorded(maps=2), recorded()
    assert [len(call.maps) for call in run.recording] == [7, 7, 0]
    for call, plain in zip(run.recording, without.recording, strict=True):
        assert list(call.slots) == [*plain.slots, *call.maps]
        assert all(torch.equal(call.slots[name], slot) for name, slot in plain.slots.items())
        assert call.nbytes - plain.nbytes == sum(call.slots[name].nbytes for name in call.maps)
    found = run.recording.slot(0, "mid_block.attentions.0.transformer_blocks.0.attn2.map")
    assert found.shape == (2, 2, HEIGHT * WIDTH // 16, TEXT_LENGTH) and found.dtype == torch.float32
    assert_close(found.sum(-1), torch.ones(found.shape[:-1]), torch.float32)
    with run.compiled.edit(run.recording, MASK, record=True) as session:  # sparse calls have no maps
        edited = guided(run.compiled, other_text(run.inputs))
    assert session.result is not None and not any(call.maps for call in session.result)
    with run.compiled.edit(run.recording, torch.zeros_like(MASK), record=True) as session:
        guided(run.compiled, other_text(run.inputs))
    assert session.result is not None and not any(call.maps for call in session.result), "they are of another text"
    with run.compiled.edit(without.recording, MASK):
        assert torch.equal(guided(run.compiled, other_text(run.inputs)), edited)


def test_recording_maps_changes_nothing() -> None:
    for name in ("sd15", "sdxl"):
        model, compiled = compiled_model(name)
        inputs = model.make_inputs(2, HEIGHT, WIDTH)
        with compiled.record(maps=STEPS):
            assert torch.equal(guided(compiled, inputs), guided(compiled.original, inputs))


@pytest.mark.parametrize("record", [False, True])
def test_columns_are_reused_while_there_are_maps_and_no_mask(record: bool) -> None:
    model, compiled = compiled_model()
    inputs = model.make_inputs(2, HEIGHT, WIDTH)
    changed = other_text(inputs)

    def call(module: Any, text: Inputs, step: int) -> Tensor:
        result: Tensor = module(**{**text, "timestep": torch.tensor(step)})[0]
        return result

    with compiled.record(maps=2) as recording:
        for step in (900, 800, 700, 600):
            call(compiled, inputs, step)
    with compiled.edit(recording, record=record) as session:
        session.reuse_maps(COLUMNS)
        first = call(compiled, changed, 900)
        session.reuse_maps(None)
        second = call(compiled, changed, 800)
        session.reuse_maps(COLUMNS)
        third = call(compiled, changed, 700)
        session.set_mask(MASK)
        fourth = call(compiled, changed, 600)
    assert session.reused_maps == [True, False, False, False]
    assert [kind for kind, _ in session.timings] == ["dense", "dense", "dense", "sparse"]
    assert not torch.allclose(first, call(compiled.original, changed, 900), atol=1e-3)
    assert_close(second, call(compiled.original, changed, 800), torch.float32)
    assert_close(third, call(compiled.original, changed, 700), torch.float32)
    assert torch.equal(fourth[..., ~MASK], call(compiled.original, inputs, 600)[..., ~MASK])
    if session.result is not None:
        assert [len(call.maps) for call in session.result] == [7, 7, 0, 0], "those of the base's calls that had them"


def test_own_columns_are_the_dense_call() -> None:
    run = recorded(maps=STEPS)
    changed = other_text(run.inputs)
    expected = guided(run.compiled.original, changed)
    for columns in (None, torch.full((TEXT_LENGTH,), -1), torch.full((2, TEXT_LENGTH), -1)):
        with run.compiled.edit(run.recording) as session:
            session.reuse_maps(COLUMNS)
            session.reuse_maps(columns)
            assert_close(guided(run.compiled, changed), expected, torch.float32)
        assert session.reused_maps == [columns is not None] * STEPS


@pytest.mark.parametrize("record", [False, True])
def test_columns_and_recorded_samples_together(record: bool) -> None:
    """A row that moves columns has no recorded output, even of the same text."""
    run = recorded(maps=1)
    changed = conditional_changed(run.inputs)
    own, identity = torch.full((TEXT_LENGTH,), -1), torch.arange(TEXT_LENGTH)
    rows: list[Tensor] = []  # the conditional sample, whatever the other one does
    for unconditional, computed in ((own, 1), (identity, 1), (COLUMNS, 2)):
        with run.compiled.edit(run.recording, record=record) as session:
            session.reuse_maps(torch.stack([unconditional, COLUMNS]))
            first = run.compiled(**{**changed, "timestep": torch.tensor(900)})[0]
            session.call = STEPS  # one is enough
        assert session.computed_samples == [computed] and session.reused_maps == [True]
        if record:
            assert session.result is not None and session.result.calls[0].maps == run.recording.calls[0].maps
            assert all(slot.shape[0] == 2 for slot in session.result.calls[0].slots.values())
        if unconditional is own:
            assert torch.equal(first[0], run.recording.slot(0, "conv_out.output")[0])
        assert_close(first[1], rows[-1] if rows else first[1], torch.float32)
        rows.append(first[1])


def test_texts_of_different_lengths() -> None:
    run = recorded(maps=1)
    text = run.inputs["encoder_hidden_states"]
    longer = {**run.inputs, "encoder_hidden_states": torch.cat([text, text], 1)}
    columns = torch.cat([torch.arange(TEXT_LENGTH), torch.full((TEXT_LENGTH,), -1)])
    with run.compiled.edit(run.recording, record=True) as session:
        session.reuse_maps(columns)
        guided(run.compiled, longer)
    assert session.reused_maps == [True, False, False] and session.result is not None
    assert session.result.slot(0, session.result.calls[0].maps[0]).shape[-1] == 2 * TEXT_LENGTH
    with run.compiled.edit(session.result) as session:  # and back, from an edit's own maps
        session.reuse_maps(torch.arange(TEXT_LENGTH))
        guided(run.compiled, run.inputs)
    assert session.reused_maps[0]


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_in_a_stock_pipeline(guidance: float) -> None:
    pipe = compiled_pipeline()
    prompts, samples = ("a cat on the left", "a red dog on the left"), 2 if guidance > 1 else 1
    with pipe.unet.record(maps=2) as recording:
        run_pipeline(pipe, prompts[0], guidance_scale=guidance)
    length = recording.calls[0].inputs["encoder_hidden_states"].shape[1]
    columns = token_columns(pipe.tokenizer, *prompts, length=length)
    with pipe.unet.edit(recording, record=True) as session:
        session.reuse_maps(guided_columns(columns) if samples == 2 else columns)
        run_pipeline(pipe, prompts[1], guidance_scale=guidance)
    assert session.computed_samples == [1, samples, samples, samples]
    assert session.reused_maps == [True, True, False, False]


@pytest.mark.parametrize("batch", [1, 3])
def test_any_batch(batch: int) -> None:
    run = recorded(batch=batch, maps=1)
    with run.compiled.edit(run.recording) as session:
        session.reuse_maps(COLUMNS)
        denoise(run.compiled, other_text(run.inputs))
    assert session.reused_maps == [True, False, False]


def test_half_precision_keeps_maps_in_its_own_dtype() -> None:
    model, _ = compiled_model()
    compiled = sparsify(copy.deepcopy(model.module).half())
    inputs = model.make_inputs(2, HEIGHT, WIDTH)
    inputs = {name: v.half() if torch.is_tensor(v) and v.is_floating_point() else v for name, v in inputs.items()}
    with compiled.record(maps=1) as recording:
        assert torch.equal(compiled(**inputs)[0], compiled.original(**inputs)[0])
    assert {recording.slot(0, name).dtype for name in recording.calls[0].maps} == {torch.float16}
    with compiled.edit(recording) as session:
        session.reuse_maps(torch.full((TEXT_LENGTH,), -1))
        edited = compiled(**other_text(inputs))[0]
    assert_close(edited, compiled.original(**other_text(inputs))[0], torch.float16)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (COLUMNS.int(), "columns of torch.int32: pass int64"),
        (COLUMNS.float(), "columns of torch.float32: pass int64"),
        (COLUMNS.expand(3, -1), r"shape \[3, 7\]: pass \[T\], the same for every sample, or \[2, T\]"),
        (torch.tensor(1), r"shape \[\]: pass \[T\]"),
        (torch.tensor([0, 7]), "column 7: the base's text has 7 tokens, so columns are from 0 to 6"),
        (torch.tensor([0, -2]), "column -2"),
    ],
)
def test_wrong_columns_are_refused_at_once(columns: Tensor, message: str) -> None:
    run = recorded(maps=1)
    with run.compiled.edit(run.recording) as session:
        with pytest.raises(ConfigError, match=message):
            session.reuse_maps(columns)
        guided(run.compiled, run.inputs)  # the session is none the worse


def test_columns_of_another_prompt_and_missing_maps_are_refused() -> None:
    run = recorded(maps=1)
    with (
        pytest.raises(ConfigError, match=r"columns for 5 tokens, but the text of this call has 7"),
        run.compiled.edit(run.recording) as session,
    ):
        session.reuse_maps(COLUMNS[:5])
        run.compiled(**other_text({**run.inputs, "timestep": torch.tensor(900)}))
    with (
        pytest.raises(RecordingError, match=r"no cross-attention maps to reuse.*compiled.record\(maps=4\)"),
        run.compiled.edit(recorded().recording) as session,
    ):
        session.reuse_maps(COLUMNS)
    for maps in (-1, True, 1.5):
        with pytest.raises(ConfigError, match="must be a number of calls"), run.compiled.record(maps):
            pass
    model, compiled = compiled_model("plain_conv")
    with pytest.raises(RecordingError, match="no attention from sites to a text"), compiled.record(maps=1):
        compiled(**model.make_inputs(1, HEIGHT, WIDTH))
