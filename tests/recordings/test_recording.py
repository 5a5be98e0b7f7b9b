"""Recordings: what they say about themselves, that their bytes are exact, and that nobody else writes to them."""

from __future__ import annotations

import pytest
import torch

from fisedit_compiler import Recording
from fisedit_compiler.errors import RecordingError
from tests.support.compiled import HEIGHT, STEPS, WIDTH, box, denoise, guided, model_and_compiled, other_text, recorded

MASK = box(4, 6, 11, 15)


@pytest.fixture(scope="module")
def recording() -> Recording:
    model, compiled = model_and_compiled()
    with compiled.record() as recording:
        denoise(compiled, model.make_inputs(2, HEIGHT, WIDTH))
    return recording


def storage_bytes(recording: Recording) -> int:
    storages = [slot.untyped_storage() for call in recording for slot in call.slots.values()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_it_describes_itself(recording: Recording):
    assert (recording.num_calls, recording.height, recording.width) == (STEPS, HEIGHT, WIDTH)
    assert recording.complete
    assert [call.timestep for call in recording] == [900.0, 800.0, 700.0]
    text = repr(recording)
    assert f"{STEPS} calls of batch 2 at {HEIGHT}x{WIDTH}" in text
    assert f"{len(recording.calls[0].slots)} slots" in text and "MiB" in text and "interrupted" not in text


def test_bytes_are_exact(recording: Recording):
    sums = [sum(slot.numel() * slot.element_size() for slot in call.slots.values()) for call in recording]
    assert recording.bytes_per_call == sums
    assert recording.nbytes == sum(sums)
    # No slot keeps a larger tensor alive, or shares its memory with another slot.
    assert storage_bytes(recording) == recording.nbytes


def test_slots_are_what_the_program_asks_for(recording: Recording):
    _, compiled = model_and_compiled()
    (program,) = compiled.programs
    for call in recording:
        assert list(call.slots) == [slot.name for slot in program.slots]
    assert recording.slot(0, "conv_in.input").shape == (2, HEIGHT * WIDTH, 4)


def test_unknown_slots_are_named(recording: Recording):
    with pytest.raises(RecordingError, match=r"no slot 'conv_in.output' at call 0; it has 3 calls"):
        recording.slot(0, "conv_in.output")
    with pytest.raises(RecordingError, match="at call 7"):
        recording.slot(7, "conv_in.input")
    empty = Recording(None, {})
    assert repr(empty) == "Recording(empty)"
    assert empty.nbytes == 0
    with pytest.raises(RecordingError, match="empty"):
        _ = empty.height


@pytest.mark.parametrize("norm", ["recorded", "incremental"])
def test_callers_may_write_to_what_they_passed_and_got(norm: str):
    model, compiled = model_and_compiled("sd15", norm=norm)
    inputs = model.make_inputs(1, HEIGHT, WIDTH)
    given = {**inputs, "sample": inputs["sample"].clone()}
    with compiled.record() as recording:
        output = compiled(**given)[0]
        base = output.clone()
        output.zero_()
        given["sample"].fill_(float("nan"))
    with compiled.edit(recording, MASK, record=True) as session:
        output = compiled(**other_text(inputs))[0]
        edited = output.clone()
        output.zero_()
    assert session.result is not None
    assert torch.equal(edited[..., ~MASK], base[..., ~MASK])
    nothing = torch.zeros_like(MASK)
    with compiled.edit(session.result, nothing):
        output = compiled(**other_text(inputs))[0]
        assert torch.equal(output, edited)
        output.zero_()
    with compiled.edit(session.result, nothing):
        assert torch.equal(compiled(**other_text(inputs))[0], edited)
    with compiled.edit(recording, nothing):
        assert torch.equal(compiled(**inputs)[0], base)


def test_an_edit_leaves_its_base_recording_alone():
    model, compiled = model_and_compiled("sd15", norm="incremental")
    inputs = model.make_inputs(1, HEIGHT, WIDTH)
    with compiled.record() as recording:
        denoise(compiled, inputs)
    before = [{name: slot.clone() for name, slot in call.slots.items()} for call in recording]
    with compiled.edit(recording, MASK, record=True):
        denoise(compiled, other_text(inputs))
    for call, slots in zip(recording, before, strict=True):
        assert all(torch.equal(call.slots[name], slot) for name, slot in slots.items())


def test_one_recording_serves_many_edits_in_any_order():
    model, compiled = model_and_compiled()
    inputs = model.make_inputs(1, HEIGHT, WIDTH)
    with compiled.record() as recording:
        denoise(compiled, inputs)
    masks = [MASK, box(0, 0, 3, WIDTH), MASK]
    results = []
    for mask in masks:
        with compiled.edit(recording, mask):
            results.append(denoise(compiled, other_text(inputs)))
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])


def test_several_resolutions_and_batches_share_a_program():
    model, compiled = model_and_compiled()
    for batch, height, width in ((1, 8, 32), (3, 24, 16), (2, 16, 24)):
        inputs = model.make_inputs(batch, height, width)
        mask = box(2, 3, 7, 12, height, width)
        with compiled.record() as recording:
            base = denoise(compiled, inputs)
        with compiled.edit(recording, mask):
            edited = denoise(compiled, other_text(inputs))
        assert torch.equal(edited[..., ~mask], base[..., ~mask])
        assert not torch.equal(edited, base)
    assert len(compiled.programs) == 1


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
    model, compiled = model_and_compiled()
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
