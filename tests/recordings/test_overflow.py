"""NaN and infinity: compared as bits, and named for what they are."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from fisedit_compiler.errors import NonFiniteError, RecordingError
from fisedit_compiler.recordings.finite import FiniteWatch
from fisedit_compiler.tensors.bits import differs
from tests.support.compiled import HEIGHT, WIDTH, box, denoise, model_and_compiled, other_text

NAN, INF = float("nan"), float("inf")
MASK = box(4, 6, 11, 15)


@pytest.fixture
def subject() -> tuple[Any, dict[str, Any]]:
    """A compiled module of one's own, and the inputs of its base."""
    model, compiled = model_and_compiled()
    return copy.deepcopy(compiled), model.make_inputs(2, HEIGHT, WIDTH)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_a_value_differs_from_other_bits_only(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, 1.0, 1.0]).to(dtype)
    assert differs(values, values.flip(0)).tolist() == [True, False, True]
    if dtype.is_floating_point:
        special = torch.tensor([[NAN, INF], [-INF, 0.0]]).to(dtype)
        assert not differs(special.T, special.T.clone()).any()
        assert differs(special, torch.zeros_like(special)).tolist() == [[True, True], [True, False]]


def test_the_first_call_with_a_value_that_is_no_number() -> None:
    watch = FiniteWatch()
    assert watch.first() is None
    for outputs in ([torch.ones(2), torch.tensor([1])], (), {"a": torch.tensor([1.0, INF])}, [torch.tensor(NAN)]):
        watch.look(outputs)
    assert watch.first() == 2


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_base_that_overflowed_is_named_at_its_end_and_cannot_be_edited(
    value: float, subject: tuple[Any, dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    compiled, inputs = subject
    base = {**inputs, "sample": inputs["sample"].clone()}
    base["sample"][0, 0, 0, 0] = value
    with caplog.at_level(logging.WARNING), compiled.record() as recording:
        denoise(compiled, base)
    assert recording.complete and recording.not_finite == 0
    assert "NaN or infinity in the outputs of call 0 (of 3)" in caplog.text and "bfloat16" in caplog.text
    with pytest.raises(NonFiniteError, match=r"(?s)call 0 .of 3.*overflow.*torch\.float32.*record the base run again"):
        compiled.edit(recording, MASK).__enter__()
    with compiled.record() as recording:
        denoise(compiled, inputs)
    assert recording.not_finite is None


def edit_with(compiled: Any, inputs: dict[str, Any], change: Any) -> None:
    with compiled.record() as recording:
        denoise(compiled, inputs)
    with compiled.edit(recording, MASK):
        sample: Tensor = inputs["sample"]
        for step in range(3):
            call = {**other_text(inputs), "sample": sample, "timestep": torch.tensor(900 - 100 * step)}
            sample = sample - 0.1 * compiled(**call)[0]
            change(step, sample)


def test_an_edit_that_overflows_inside_its_mask_is_named(subject: tuple[Any, dict[str, Any]]) -> None:
    def overflow(step: int, sample: Tensor) -> None:
        if step == 0:
            sample[:, :, 6, 8] = INF

    with pytest.raises(NonFiniteError, match=r"By call 2 the edit's own values hold NaN.*the recording's do not"):
        edit_with(*subject, overflow)


def test_an_edit_that_overflows_outside_its_mask_is_no_other_seed(subject: tuple[Any, dict[str, Any]]) -> None:
    def overflow(step: int, sample: Tensor) -> None:
        if step == 0:
            sample[:, :, 0, 0] = NAN

    with pytest.raises(NonFiniteError, match="By call 1 the edit's own values hold NaN"):
        edit_with(*subject, overflow)


def test_nan_outside_the_mask_that_the_base_has_too_is_the_base(subject: tuple[Any, dict[str, Any]]) -> None:
    """The recording is refused for what its outputs hold, never for another seed."""
    compiled, inputs = subject
    inputs["sample"][:, :, 0, 0] = NAN
    with compiled.record() as recording:
        denoise(compiled, inputs)
    recording.not_finite = None
    with pytest.raises(NonFiniteError) as caught, compiled.edit(recording, MASK) as session:
        denoise(compiled, other_text(inputs))
    assert session.call == 2 and "seed" not in str(caught.value)
    assert issubclass(NonFiniteError, RecordingError)
