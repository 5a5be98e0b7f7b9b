"""Mistakes with recordings and modes: each message names the remedy, and afterwards all work as before."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fisedit_compiler
from fisedit_compiler import SparseModule, errors, sparsify
from fisedit_compiler.errors import CaptureError, ConfigError, FiseditError, MaskError, ModeError, RecordingError
from tests.contracts.conftest import MASK, Usable, first_call
from tests.support.compiled import (
    HEIGHT,
    WIDTH,
    denoise,
    model_and_compiled,
    other_text,
)


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
    with (
        pytest.raises(RecordingError, match=r"unfinished.*if it is an edit's, make that edit again"),
        usable.compiled.edit(session.result, MASK),
    ):
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
        assert in_thread(usable.check) is None, "it has runs of its own meanwhile"
        assert in_thread(lambda: compiled(**usable.inputs)) is None, "or none"
        denoise(compiled, usable.inputs)
    assert recording.num_calls == 3


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
