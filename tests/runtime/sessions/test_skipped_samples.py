"""Dense calls of an edit without a mask: samples that are recorded already are not computed again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fisedit_compiler import SparsifyConfig, sparsify
from fisedit_compiler.errors import RecordingError
from fisedit_compiler.kernels.tolerances import assert_close
from fisedit_compiler.recordings.recorded_inputs import FIRST_CALLS
from fisedit_compiler.runtime.calls.binding import Binder
from fisedit_compiler.runtime.sessions import dense_calls
from tests.support.compiled import (
    HEIGHT,
    STEPS,
    WIDTH,
    box,
    conditional_changed,
    denoise,
    guided,
    model_and_compiled,
    other_text,
    recorded,
)
from tests.support.zoo import Inputs

MASK = box(4, 6, 11, 15)


@contextmanager
def batches(module: nn.Module) -> Iterator[list[int]]:
    """The batch of every call that the module itself runs."""
    seen: list[int] = []

    def noted(self: Binder, *args: Any, **kwargs: Any) -> Any:
        assert self.module is module
        seen.append(int((kwargs["sample"] if "sample" in kwargs else args[0]).shape[0]))
        return module(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Binder, "_call_module", noted)  # a hook would make it another model
        yield seen


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
    model, compiled = model_and_compiled()
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
    assert session.computed_samples == [1] and seen == [1]
    run = recorded()
    with pytest.raises(RecordingError, match="Call 0 is at timestep 850"), run.compiled.edit(run.recording):
        run.compiled(**{**run.inputs, "timestep": torch.tensor(850)})


def test_images_that_follow_the_base_apart_from_others() -> None:
    """Latents that part are not compared any more, those of other images with them."""
    model, compiled = model_and_compiled()
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
    model, shared = model_and_compiled()
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
    model, _ = model_and_compiled()
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
    assert session.computed_samples == [2] and seen == [2]
    with compiled.edit(recording) as session:
        compiled(**inputs)
    assert session.computed_samples == [0], "a whole batch that is recorded needs no cutting"


def test_measured_times_are_those_of_whole_calls() -> None:
    run = recorded()
    with run.compiled.edit(run.recording) as session:
        guided(run.compiled, conditional_changed(run.inputs))
    (dense,) = session.measured()
    assert (dense.kind, dense.calls) == ("dense", STEPS - 1)
