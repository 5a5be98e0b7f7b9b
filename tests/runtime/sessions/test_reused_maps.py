"""Recorded cross-attention maps: which calls keep theirs, and that dense calls of an edit take columns of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from fisedit_compiler import sparsify
from fisedit_compiler.errors import ConfigError, RecordingError
from fisedit_compiler.kernels.tolerances import assert_close
from fisedit_compiler.pipelines.editing.words import guided_columns, token_columns
from tests.support.compiled import (
    HEIGHT,
    STEPS,
    WIDTH,
    box,
    compiled_pipeline,
    conditional_changed,
    denoise,
    guided,
    model_and_compiled,
    other_text,
    recorded,
    run_pipeline,
)
from tests.support.zoo import TEXT_LENGTH, Inputs

COLUMNS = torch.tensor([0, 1, -1, 2, 3, -1, 6])
MASK = box(4, 6, 11, 15)


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
        model, compiled = model_and_compiled(name)
        inputs = model.make_inputs(2, HEIGHT, WIDTH)
        with compiled.record(maps=STEPS):
            assert torch.equal(guided(compiled, inputs), guided(compiled.original, inputs))


@pytest.mark.parametrize("record", [False, True])
def test_columns_are_reused_while_there_are_maps_and_no_mask(record: bool) -> None:
    model, compiled = model_and_compiled()
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
    model, _ = model_and_compiled()
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
    model, compiled = model_and_compiled("plain_conv")
    with pytest.raises(RecordingError, match="no attention from sites to a text"), compiled.record(maps=1):
        compiled(**model.make_inputs(1, HEIGHT, WIDTH))
