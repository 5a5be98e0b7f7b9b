"""What ``torch.compile(unet, backend="fisedit")`` refuses, each with its remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

from fisedit_compiler import dynamo, sparsify
from fisedit_compiler.errors import CaptureError, ConfigError, ModeError, RecordingError
from tests.support.dynamo_models import MASK, SAMPLE, Broken, Convolved, Plain


def test_unknown_options_are_refused_with_the_valid_ones():
    compiled: Any = torch.compile(Plain().eval(), backend="fisedit", options={"nrom": "recorded", "dilation": 1})
    message = r"'nrom', unknown to backend='fisedit'; valid options .*: attention, .*skip_recorded, spatial_inputs"
    with pytest.raises(BackendCompilerFailed, match=message) as raised:
        compiled(SAMPLE)
    assert isinstance(raised.value.inner_exception, ConfigError)
    with pytest.raises(ConfigError, match=message), dynamo.record(compiled):
        pass


def test_options_outside_their_range_are_refused():
    compiled: Any = torch.compile(Plain().eval(), backend="fisedit", options={"norm": "none"})
    with pytest.raises(BackendCompilerFailed, match=r"SparsifyConfig.norm='none' is unknown; choose one of"):
        compiled(SAMPLE)


def test_modes_of_inductor_are_refused():
    compiled: Any = torch.compile(Plain().eval(), backend="fisedit", mode="max-autotune")
    with pytest.raises(BackendCompilerFailed, match=r'Leave mode= away; .*options=\{"backend": "inductor"\}'):
        compiled(SAMPLE)


def test_a_graph_break_is_refused_with_its_line():
    compiled: Any = torch.compile(Broken().eval(), backend="fisedit")
    with pytest.raises(BackendCompilerFailed, match=r"forward\(\) \(dynamo_models.py:\d+: .*graph_break") as raised:
        compiled(SAMPLE)
    assert isinstance(raised.value.inner_exception, CaptureError)
    assert "fullgraph=True" in str(raised.value) and "sparsify(module)" in str(raised.value)


def test_a_function_is_refused():
    compiled = torch.compile(lambda sample: sample + 1, backend="fisedit")
    with pytest.raises(BackendCompilerFailed, match="not the forward of a module"):
        compiled(SAMPLE)
    with pytest.raises(ModeError, match=r'Pass what `torch.compile\(module, backend="fisedit"\)` returned'):
        dynamo.sparse_module(compiled)


@pytest.mark.parametrize("shared", [False, True])
def test_a_tensor_inside_an_object_is_refused(shared: bool):
    class Box:
        value = SAMPLE + 1

        def __init__(self) -> None:
            if not shared:
                self.value = SAMPLE + 2

    class Opening(Convolved):
        def forward(self, sample: Tensor, box: Box) -> Tensor:
            return self.conv(sample) + box.value

    compiled: Any = torch.compile(Opening().eval(), backend="fisedit")
    with pytest.raises(BackendCompilerFailed, match=r"reads its argument 'box'.*Pass tensors themselves"):
        compiled(SAMPLE, Box())


def test_an_input_handed_on_is_refused_in_modes():
    class Handing(Convolved):
        def forward(self, sample: Tensor) -> tuple[Tensor, Tensor]:
            return self.conv(sample), sample

    compiled: Any = torch.compile(Handing().eval(), backend="fisedit")
    assert compiled(SAMPLE)[1] is SAMPLE
    with pytest.raises(CaptureError, match="returns 2 tensors, its graph 1"), dynamo.record(compiled):
        compiled(SAMPLE)


def test_an_edit_needs_a_recording():
    compiled: Any = torch.compile(Plain().eval(), backend="fisedit")
    with pytest.raises(RecordingError, match="needs a recording"), dynamo.edit(compiled, None, MASK):  # type: ignore[arg-type]
        pass
    with dynamo.record(compiled) as recording:
        pass
    with pytest.raises(RecordingError, match="recording is empty"), dynamo.edit(compiled, recording, MASK):
        pass


def test_another_run_than_the_recorded_one_is_refused_in_its_own_words():
    compiled: Any = torch.compile(Plain().eval(), backend="fisedit")
    with dynamo.record(compiled) as recording:
        compiled(SAMPLE)
    with pytest.raises(RecordingError, match="edit at the recorded resolution"), dynamo.edit(compiled, recording, MASK):
        compiled(SAMPLE[..., :4])
    with dynamo.edit(compiled, recording, MASK):
        torch.testing.assert_close(compiled(SAMPLE), compiled._orig_mod(SAMPLE))


def test_modes_do_not_nest():
    module = Plain().eval()
    compiled: Any = torch.compile(module, backend="fisedit")
    again: Any = torch.compile(module, backend="fisedit", options={"dilation": 1})
    for other in (compiled, again):
        with dynamo.record(compiled), pytest.raises(ModeError, match="Modes do not nest"), dynamo.record(other):
            pass
    with dynamo.record(compiled) as recording:
        again(SAMPLE)  # compiled with other options, it is another program, and in no mode
    assert recording.num_calls == 0


def test_a_call_that_torch_runs_without_the_backend_is_refused():
    compiled: Any = torch.compile(Plain().eval(), backend="fisedit")
    with (
        pytest.raises(ModeError, match="ran this call without its backend"),
        dynamo.record(compiled) as recording,
        torch.compiler.set_stance("force_eager"),
    ):
        compiled(SAMPLE)
    assert not recording.complete
    with torch.compiler.set_stance("force_eager"):
        compiled(SAMPLE)


def test_only_what_torch_compile_returned_has_modes():
    module = Plain().eval()
    for wrong in (
        module,
        torch.compile(module, backend="eager"),
        torch.compile(module, disable=True),
        sparsify(module),
    ):
        with (
            pytest.raises(ModeError, match=r'torch.compile\(module, backend="fisedit"\)'),
            dynamo.record(wrong),  # type: ignore[arg-type]
        ):
            pass


def test_forward_hooks_are_refused():
    module = Plain().eval()
    module.register_forward_hook(lambda module, inputs, output: output + 1)
    compiled: Any = torch.compile(module, backend="fisedit")
    with pytest.raises(ModeError, match="has forward hooks"), dynamo.record(compiled):
        pass
