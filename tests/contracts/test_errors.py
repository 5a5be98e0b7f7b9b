"""Mistakes: each message names the remedy, and afterwards recording and module work as before.

The ``usable`` fixture checks the second half after every test of this file that uses it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from fisedit_compiler import Recording
from fisedit_compiler.errors import FiseditError, MaskError, RecordingError
from fisedit_compiler.runtime.calls.binding import Binder
from fisedit_compiler.runtime.execution.executable import Executable
from tests.contracts.conftest import MASK, Usable, first_call
from tests.support.compiled import (
    HEIGHT,
    WIDTH,
    box,
    compiled_pipeline,
    denoise,
    model_and_compiled,
    run_pipeline,
)

PIPE_MASK = box(4, 3, 10, 9, 16, 16)


# -- masks ---------------------------------------------------------------------------------------

WRONG_MASKS: dict[str, tuple[Any, str]] = {
    "size": (torch.zeros(HEIGHT + 1, WIDTH, dtype=torch.bool), "resize the mask"),
    "transposed": (MASK.T, "this run takes 16 x 24"),
    "integers": (MASK.long(), "pass mask != 0"),
    "complex": (MASK.to(torch.complex64), "must be bool, uint8 or float"),
    "nan": (torch.full(MASK.shape, float("nan")), "every value must say active"),
    "range": (255.0 * MASK, "scale it, or pass mask > threshold"),
    "batch": (MASK.expand(2, HEIGHT, WIDTH), "one mask serves the whole batch"),
    "array": (MASK.numpy().astype(np.int32), "pass mask != 0"),
    "list": (MASK.tolist(), "pass a torch tensor, a numpy array, a PIL image or the path"),
    "path": (Path("no-such-mask.png"), "check the path"),
}


@pytest.mark.parametrize("name", sorted(WRONG_MASKS))
def test_wrong_masks(usable: Usable, name: str):
    mask, remedy = WRONG_MASKS[name]
    with pytest.raises(MaskError, match=remedy), usable.compiled.edit(usable.recording, mask):
        pytest.fail("the mask is checked before anything runs")


def test_a_wrong_mask_in_the_middle_of_a_run(usable: Usable):
    with pytest.raises(MaskError, match="resize"), usable.compiled.edit(usable.recording) as session:
        usable.compiled(**{**usable.inputs, "timestep": torch.tensor(900)})
        session.set_mask(MASK[:5])


def test_an_empty_mask_is_no_mistake_and_costs_no_call(usable: Usable, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("an empty mask must not run the model")

    with monkeypatch.context() as patched:
        patched.setattr(Binder, "_call_module", refuse)  # a hook would make it another model
        patched.setattr(Executable, "step", refuse)
        patched.setattr(Executable, "record", refuse)
        patched.setattr(Executable, "interpret", refuse)
        assert torch.equal(usable.edit(torch.zeros_like(MASK)), usable.base)


# -- another run than the recorded one -------------------------------------------------------------


def cropped(usable: Usable) -> dict[str, Any]:
    return first_call(usable, sample=usable.inputs["sample"][..., :16])


def halved(usable: Usable) -> dict[str, Any]:
    names = ("sample", "encoder_hidden_states")
    return first_call(usable, **{name: usable.inputs[name][:1] for name in names})


OTHER_CALLS: dict[str, tuple[Callable[[Usable], dict[str, Any]], str]] = {
    "resolution": (cropped, "16x16 input, the recording 16x24: edit at the recorded resolution, or record again"),
    "batch": (halved, "guidance was switched on or off.*Edit with the recorded guidance"),
    "timestep": (
        lambda usable: first_call(usable, timestep=torch.tensor(901)),
        "timestep 901.0, the recording at 900.0: another scheduler or another number of inference steps",
    ),
    "noise": (
        lambda usable: first_call(usable, sample=usable.inputs["sample"] + 1e-6),
        "outside the mask.*same seed .a fresh generator., the same scheduler, the same guidance scale",
    ),
    "dtype": (
        lambda usable: first_call(usable, encoder_hidden_states=usable.inputs["encoder_hidden_states"].double()),
        "encoder_hidden_states.*float64.*Edit with the arguments of the recorded run",
    ),
    "arguments": (
        lambda usable: first_call(usable, timestep_cond=torch.zeros(2, 8)),
        "timestep_cond.*Edit with the arguments of the recorded run",
    ),
}


@pytest.mark.parametrize("name", sorted(OTHER_CALLS))
def test_another_call_than_the_recorded_one(usable: Usable, name: str):
    make_call, remedy = OTHER_CALLS[name]
    with pytest.raises(FiseditError, match=remedy), usable.compiled.edit(usable.recording, MASK):
        usable.compiled(**make_call(usable))


def test_checking_inputs_can_be_switched_off():
    model, compiled = model_and_compiled("sd15", check_inputs=False)
    inputs = model.make_inputs(2, HEIGHT, WIDTH)
    with compiled.record() as recording:
        base = compiled(**inputs)[0]
    with compiled.edit(recording, MASK):
        edited = compiled(**model.make_inputs(2, HEIGHT, WIDTH, seed=1))[0]
    assert torch.equal(edited[..., ~MASK], base[..., ~MASK])


def test_too_many_calls(usable: Usable):
    with (
        pytest.raises(RecordingError, match=r"call 4 of the edit, but the recording has only 3.*recorded settings"),
        usable.compiled.edit(usable.recording, MASK) as session,
    ):
        denoise(usable.compiled, usable.inputs, steps=4)
    assert session.call == 3


def test_too_few_calls(usable: Usable):
    with (
        pytest.raises(RecordingError, match=r"ended after 2 calls, the recording has 3.*settings of the recorded run"),
        usable.compiled.edit(usable.recording, MASK, record=True) as session,
    ):
        denoise(usable.compiled, usable.inputs, steps=2)
    # What it left behind is no recording to edit.
    assert session.result is not None
    with pytest.raises(RecordingError, match="unfinished"), usable.compiled.edit(session.result, MASK):
        pass


@pytest.fixture(scope="module")
def pipeline_run() -> tuple[Any, Recording, Tensor]:
    pipe = compiled_pipeline()
    with pipe.unet.record() as recording:
        base = run_pipeline(pipe)
    return pipe, recording, base


OTHER_RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"seed": 4}, "the same seed"),
    "guidance scale": ({"guidance_scale": 6.0}, "the same guidance scale"),
    "guidance off": ({"guidance_scale": 1.0}, "Edit with the recorded guidance"),
    "more steps": ({"num_inference_steps": 5}, "another number of inference steps"),
    "fewer steps": ({"num_inference_steps": 3}, "another number of inference steps"),
    "resolution": ({"height": 40, "width": 32}, "edit at the recorded resolution, or record again"),
    "images": ({"num_images_per_prompt": 2}, "the number of images changed"),
    "scheduler": ({}, "another scheduler"),
}


@pytest.mark.parametrize("name", sorted(OTHER_RUNS))
def test_another_pipeline_run(pipeline_run: tuple[Any, Recording, Tensor], name: str):
    pipe, recording, base = pipeline_run
    settings, remedy = OTHER_RUNS[name]
    scheduler = pipe.scheduler
    if name == "scheduler":
        config = {**scheduler.config, "timestep_spacing": "trailing"}
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(config)
    try:
        with pytest.raises(RecordingError, match=remedy), pipe.unet.edit(recording, PIPE_MASK):
            run_pipeline(pipe, "a dog", **settings)
    finally:
        pipe.scheduler = scheduler
    with pipe.unet.edit(recording, PIPE_MASK):
        edited = run_pipeline(pipe, "a dog")
    assert torch.equal(edited[..., ~PIPE_MASK], base[..., ~PIPE_MASK])
