"""The wrapped module: in no mode it is the original, and it stays one when moved, copied, saved or reloaded."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from fisedit_compiler import SparseModule
from fisedit_compiler.errors import RecordingError
from tests.support.compiled import HEIGHT, WIDTH, box, denoise, model_and_compiled, other_text

MASK = box(4, 6, 11, 15)


def call_styles(inputs: dict) -> list[tuple[tuple, dict]]:
    sample, timestep, text = inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"]
    return [
        ((sample, timestep, text), {}),
        ((sample, int(timestep)), {"encoder_hidden_states": text, "return_dict": True}),
        ((sample,), {"timestep": timestep.float(), "encoder_hidden_states": text, "return_dict": False}),
        ((), {"sample": sample, "timestep": timestep[None], "encoder_hidden_states": text}),
    ]


def test_in_no_mode_it_is_the_original():
    model, compiled = model_and_compiled()
    inputs = model.make_inputs(2, HEIGHT, WIDTH)
    with torch.no_grad():
        for args, kwargs in call_styles(inputs):
            ours, theirs = compiled(*args, **kwargs), model.module(*args, **kwargs)
            assert type(ours) is type(theirs)
            assert torch.equal(ours[0], theirs[0])
    assert "in no mode" in repr(compiled)


def test_both_modes_take_every_style_of_call_and_return_the_same_type():
    model, compiled = model_and_compiled()
    for args, kwargs in call_styles(model.make_inputs(2, HEIGHT, WIDTH)):
        expected = model.module(*args, **kwargs)
        with compiled.record() as recording:
            recorded = compiled(*args, **kwargs)
        with compiled.edit(recording, MASK):
            edited = compiled(*args, **kwargs)
        assert type(recorded) is type(edited) is type(expected)
        assert torch.equal(recorded[0], expected[0])
        if kwargs.get("return_dict", True):
            assert isinstance(edited, UNet2DConditionOutput)
            assert torch.equal(edited.sample[..., ~MASK], expected.sample[..., ~MASK])


def test_a_recording_in_one_style_serves_an_edit_in_another():
    model, compiled = model_and_compiled()
    styles = call_styles(model.make_inputs(2, HEIGHT, WIDTH))
    with compiled.record() as recording:
        base = compiled(*styles[0][0], **styles[0][1])[0]
    for args, kwargs in styles[1:]:
        with compiled.edit(recording, MASK):
            edited = compiled(*args, **kwargs)[0]
        torch.testing.assert_close(edited, base, rtol=1e-4, atol=1e-5)


def test_attributes_weights_and_keys_are_the_originals():
    model, compiled = model_and_compiled()
    unet = model.module
    assert compiled.original is unet
    assert compiled.config is unet.config
    assert (compiled.dtype, compiled.device) == (unet.dtype, unet.device)
    assert compiled.conv_in is unet.conv_in
    assert compiled.state_dict().keys() == unet.state_dict().keys()
    assert {p.data_ptr() for p in compiled.parameters()} == {p.data_ptr() for p in unet.parameters()}
    assert "forward" not in vars(unet) and not unet._forward_hooks and not unet._forward_pre_hooks
    with pytest.raises(AttributeError, match="no_such_attribute"):
        _ = compiled.no_such_attribute


def test_it_passes_for_the_originals_class():
    _, compiled = model_and_compiled()
    assert isinstance(compiled, UNet2DConditionModel)
    assert isinstance(compiled, SparseModule)
    assert type(compiled) is SparseModule
    assert repr(compiled) == "SparseModule(UNet2DConditionModel, 1 program, in no mode)"
    with compiled.record():
        assert "inside record()" in repr(compiled)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_are_independent(make_copy):
    model, compiled = model_and_compiled()
    inputs = model.make_inputs(1, HEIGHT, WIDTH)
    with compiled.record() as recording:
        base = denoise(compiled, inputs)
        twin = make_copy(compiled)
    assert type(twin) is SparseModule
    assert twin.sparsify_config == compiled.sparsify_config
    assert twin.original is not compiled.original
    # Equal weights are the same model: the recording made with one serves the other.
    with twin.edit(recording, MASK):
        edited = denoise(twin, other_text(inputs))
    assert torch.equal(edited[..., ~MASK], base[..., ~MASK])
    with torch.no_grad():
        twin.conv_out.weight.mul_(2.0)
    assert torch.equal(denoise(compiled, inputs), base)


def test_loading_weights_is_noticed():
    model, shared = model_and_compiled()
    compiled = copy.deepcopy(shared)
    inputs = model.make_inputs(1, HEIGHT, WIDTH)
    with compiled.record() as recording:
        base = denoise(compiled, inputs)
    state = {name: value.clone() for name, value in compiled.state_dict().items()}
    compiled.load_state_dict({name: 1.01 * value for name, value in state.items()})
    with pytest.raises(RecordingError, match="weights differ"), compiled.edit(recording, MASK):
        pass
    compiled.load_state_dict(state)
    with compiled.edit(recording, MASK):
        edited = denoise(compiled, other_text(inputs))
    assert torch.equal(edited[..., ~MASK], base[..., ~MASK])


def test_inference_mode():
    model, compiled = model_and_compiled()
    inputs = model.make_inputs(1, HEIGHT, WIDTH)
    with torch.inference_mode():
        with compiled.record() as recording:
            base = denoise(compiled, inputs)
        edited = {}
        for seed in (1, 2, 1):
            with compiled.edit(recording, MASK):
                edited[seed] = denoise(compiled, other_text(inputs, seed))
    with compiled.edit(recording, MASK):
        outside = denoise(compiled, other_text(inputs, 1))
    assert torch.equal(outside, edited[1])
    assert not torch.equal(edited[1], edited[2])
    assert torch.equal(outside[..., ~MASK], base[..., ~MASK])


def test_inference_tensors_written_in_place_are_noticed():
    model, compiled = model_and_compiled()
    inputs = model.make_inputs(1, HEIGHT, WIDTH)
    with torch.inference_mode():
        text = other_text(inputs, 5)
        with compiled.record() as recording:
            denoise(compiled, inputs)
        with compiled.edit(recording, MASK):
            first = denoise(compiled, text)
        text["encoder_hidden_states"].mul_(-1.0)
        with compiled.edit(recording, MASK):
            second = denoise(compiled, text)
    assert not torch.equal(first, second)
