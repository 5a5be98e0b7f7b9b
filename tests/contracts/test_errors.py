"""Mistakes: each message names the remedy, and afterwards recording and module work as before.

The ``usable`` fixture checks the second half after every test of this file that uses it.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fisedit_compiler
from fisedit_compiler import Recording, SparseModule, errors, sparsify
from fisedit_compiler.errors import CaptureError, ConfigError, FiseditError, MaskError, ModeError, RecordingError
from fisedit_compiler.runtime.calls.binding import Binder
from fisedit_compiler.runtime.execution.executable import Executable
from tests.support.compiled import (
    HEIGHT,
    WIDTH,
    box,
    compiled_pipeline,
    denoise,
    model_and_compiled,
    other_text,
    run_pipeline,
)

MASK = box(4, 6, 11, 15)
PIPE_MASK = box(4, 3, 10, 9, 16, 16)


class Usable:
    """A module with a recording, and the check that both still work."""

    def __init__(self) -> None:
        model, self.compiled = model_and_compiled()
        self.inputs = model.make_inputs(2, HEIGHT, WIDTH)
        with self.compiled.record() as self.recording:
            self.base = denoise(self.compiled, self.inputs)
        self.edited = self.edit()

    def edit(self, mask: Any = MASK) -> Tensor:
        with self.compiled.edit(self.recording, mask):
            return denoise(self.compiled, other_text(self.inputs))

    def check(self) -> None:
        assert torch.equal(self.compiled(**self.inputs)[0], self.compiled.original(**self.inputs)[0])
        assert torch.equal(self.edit(), self.edited)
        with self.compiled.record() as recording:
            assert torch.equal(denoise(self.compiled, self.inputs), self.base)
        assert recording.complete


@pytest.fixture
def usable() -> Iterator[Usable]:
    subject = Usable()
    yield subject
    subject.check()


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
        assert torch.equal(usable.edit(torch.zeros_like(MASK)), usable.base)


# -- another run than the recorded one -------------------------------------------------------------


def first_call(usable: Usable, **changes: Any) -> dict[str, Any]:
    return {**usable.inputs, "timestep": torch.tensor(900), **changes}


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


# -- recordings ------------------------------------------------------------------------------------


def test_editing_without_a_recording(usable: Usable):
    with pytest.raises(RecordingError, match=r"got NoneType. Make one first: `with compiled.record"):
        usable.compiled.edit(None, MASK).__enter__()
    with pytest.raises(RecordingError, match="got dict"):
        usable.compiled.edit({}, MASK).__enter__()  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="recording"):
        usable.compiled.edit()  # type: ignore[call-arg]


def test_an_empty_recording(usable: Usable):
    with usable.compiled.record() as recording:
        pass
    with pytest.raises(RecordingError, match=r"Set `pipe.unet = compiled`"), usable.compiled.edit(recording, MASK):
        pass


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_an_interrupted_recording(usable: Usable, exception: type[BaseException]):
    with pytest.raises(exception), usable.compiled.record() as recording:
        usable.compiled(**usable.inputs)
        raise exception
    assert not recording.complete
    assert "interrupted" in repr(recording)
    with (
        pytest.raises(RecordingError, match=r"unfinished .1 calls.*Record the base run again"),
        usable.compiled.edit(recording, MASK),
    ):
        pass


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt])
def test_an_interrupted_edit(usable: Usable, exception: type[BaseException]):
    with (
        pytest.raises(exception),
        usable.compiled.edit(usable.recording, MASK, record=True) as session,
    ):
        usable.compiled(**first_call(usable))
        raise exception
    assert session.result is not None
    with pytest.raises(RecordingError, match="unfinished"), usable.compiled.edit(session.result, MASK):
        pass


def test_a_call_that_the_model_itself_refuses(usable: Usable):
    inputs = first_call(usable, encoder_hidden_states=usable.inputs["encoder_hidden_states"][..., :-1])
    with (
        pytest.raises(CaptureError, match=r"(?s)could not capture UNet2DConditionModel.*Remedy"),
        usable.compiled.record(),
    ):
        usable.compiled(**inputs)


def test_a_recording_of_another_model(usable: Usable):
    model, other = model_and_compiled("plain_conv")
    with other.record() as recording:
        other(**model.make_inputs(2, HEIGHT, WIDTH))
    with pytest.raises(RecordingError, match=r"another model.*Record the base run again"):
        usable.compiled.edit(recording, MASK).__enter__()


def test_a_recording_with_another_configuration(usable: Usable):
    _, other = model_and_compiled("sd15", norm="incremental")
    with pytest.raises(RecordingError, match=r"'norm': 'recorded'.*'norm': 'incremental'.*Record again, or sparsify"):
        other.edit(usable.recording, MASK).__enter__()


def write_data(module: nn.Module) -> None:
    module.conv_out.weight.data.mul_(1.001)


def write_in_place(module: nn.Module) -> None:
    with torch.no_grad():
        module.mid_block.resnets[0].conv1.bias.add_(0.01)


def replace_parameter(module: nn.Module) -> None:
    module.conv_in.weight = nn.Parameter(module.conv_in.weight * 1.001)


@pytest.mark.parametrize("change", [write_data, write_in_place, replace_parameter])
def test_weights_changed_since_recording(change: Callable[[nn.Module], None]):
    model, shared = model_and_compiled()
    compiled = copy.deepcopy(shared)
    inputs = model.make_inputs(1, HEIGHT, WIDTH)
    with compiled.record() as recording:
        before = denoise(compiled, inputs)
    change(compiled.original)
    with pytest.raises(RecordingError, match=r"weights differ: another checkpoint, a LoRA"):
        compiled.edit(recording, MASK).__enter__()
    with compiled.record() as recording:
        after = denoise(compiled, inputs)
    assert torch.equal(after, denoise(compiled.original, inputs))
    assert not torch.equal(after, before)
    with compiled.edit(recording, MASK):
        edited = denoise(compiled, other_text(inputs))
    assert torch.equal(edited[..., ~MASK], after[..., ~MASK])


def test_structure_changed_since_recording():
    model, shared = model_and_compiled()
    compiled = copy.deepcopy(shared)
    with compiled.record() as recording:
        denoise(compiled, model.make_inputs(1, HEIGHT, WIDTH))
    activation = compiled.original.conv_act
    compiled.original.conv_act = nn.GELU()
    with pytest.raises(RecordingError, match="the structure or the weights differ"):
        compiled.edit(recording, MASK).__enter__()
    compiled.original.conv_act = activation
    with compiled.edit(recording, MASK):
        denoise(compiled, model.make_inputs(1, HEIGHT, WIDTH))


# -- modes ------------------------------------------------------------------------------------------


def test_modes_do_not_nest(usable: Usable):
    compiled = usable.compiled
    with compiled.record() as outer:
        for enter in (compiled.record, lambda: compiled.edit(usable.recording, MASK)):
            with pytest.raises(ModeError, match=r"while record\(\) is active.*leave the first `with` block"):
                enter().__enter__()
        denoise(compiled, usable.inputs)
    assert outer.complete and outer.num_calls == 3
    with compiled.edit(usable.recording, MASK):
        with pytest.raises(ModeError, match=r"record\(\) was entered while edit\(\) is active"):
            compiled.record().__enter__()
        assert torch.equal(denoise(compiled, other_text(usable.inputs)), usable.edited)


def in_thread(function: Callable[[], Any]) -> BaseException | None:
    """Run in a thread; returns what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0] if raised else None


def test_another_thread(usable: Usable):
    compiled = usable.compiled
    with compiled.record() as recording:
        error = in_thread(lambda: compiled.record().__enter__())
        assert isinstance(error, ModeError) and "Modes do not nest" in str(error)
        error = in_thread(lambda: compiled(**usable.inputs))
        assert isinstance(error, ModeError)
        assert "inside record() in another thread" in str(error) and "sparsify a second copy" in str(error)
        denoise(compiled, usable.inputs)
    assert recording.num_calls == 3
    # A whole run in one other thread is fine.
    assert in_thread(usable.check) is None


def test_training_mode():
    model, shared = model_and_compiled()
    compiled = copy.deepcopy(shared)
    with compiled.record() as recording:
        denoise(compiled, model.make_inputs(1, HEIGHT, WIDTH))
    compiled.train()
    for enter in (compiled.record, lambda: compiled.edit(recording, MASK)):
        with pytest.raises(ModeError, match=r"training mode.*call \.eval\(\) first"):
            enter().__enter__()
    with pytest.raises(CaptureError, match=r"training mode; call \.eval\(\) first"):
        sparsify(compiled.original)
    compiled.eval()
    with compiled.edit(recording, MASK):
        denoise(compiled, model.make_inputs(1, HEIGHT, WIDTH))


# -- the errors themselves --------------------------------------------------------------------------


def test_one_base_class_catches_all():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) > 8
    assert all(issubclass(kind, FiseditError) for kind in kinds)
    assert all(kind.__doc__ for kind in kinds)
    assert issubclass(ConfigError, ValueError) and issubclass(MaskError, ValueError)


def test_the_public_surface_is_small():
    assert set(fisedit_compiler.__all__) >= {"Recording", "SparseModule", "SparsifyConfig", "sparsify"}
    assert all(hasattr(fisedit_compiler, name) for name in fisedit_compiler.__all__)
    assert SparseModule.__doc__


def test_a_size_that_the_model_cannot_halve_is_refused_while_recording() -> None:
    """Outside the modes the original takes it; the module stays usable."""
    model, compiled = model_and_compiled()
    odd = model.make_inputs(2, HEIGHT + model.multiple // 2, WIDTH)
    compiled(**odd)
    with (
        pytest.raises(RecordingError, match=rf"both sizes to be multiples of {model.multiple}. Choose another"),
        compiled.record(),
    ):
        compiled(**odd)
    with compiled.record() as recording:
        compiled(**model.make_inputs(2, HEIGHT, WIDTH))
    assert recording.complete
