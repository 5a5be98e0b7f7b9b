"""What a run keeps for the next one is its own memory: whoever writes to a tensor, however, nobody gets old values."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from fisedit_compiler import Recording, SparseModule, SparsifyConfig, sparsify
from tests.support.compiled import box
from tests.support.zoo import Inputs
from tests.tensors.test_contents import WRITES

MASK = box(2, 2, 6, 6, 8, 8)
Write = Callable[[Tensor, Tensor], None]


class Conditioned(nn.Module):
    """A map scaled by a view of the text; it also returns the text, a view of it and a value computed from it alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.project = nn.Linear(4, 4)

    def forward(self, sample: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scaled = self.conv(sample) * text[:, :, None, None] + self.project(text)[:, :, None, None]
        return scaled, text.unsqueeze(1), self.project(text)


@cache
def conditioned() -> SparseModule:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Conditioned().eval()
    config = SparsifyConfig(multiple=1, dense_above=1.0, skip_recorded=False, cache=False)
    return sparsify(module, config, example_inputs=inputs_of(text_of(0)))


def text_of(seed: int) -> Tensor:
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))


def inputs_of(text: Tensor) -> Inputs:
    return {"sample": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(9)), "text": text}


def recorded(compiled: SparseModule, calls: int = 2) -> Recording:
    with compiled.record() as recording, torch.no_grad():
        for _ in range(calls):
            compiled(**inputs_of(text_of(0)))
    return recording


@torch.no_grad()
def assert_is_dense_inside(compiled: SparseModule, outputs: tuple[Tensor, ...], text: Tensor) -> None:
    """One convolution of the recorded sample: inside the mask an edit is the dense call of its text."""
    expected = compiled.original(**inputs_of(text))
    torch.testing.assert_close(outputs[0][..., MASK], expected[0][..., MASK])
    for value, other in zip(outputs[1:], expected[1:], strict=True):
        torch.testing.assert_close(value, other)


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_a_text_rewritten_between_two_edits_is_the_new_text(write: Write) -> None:
    compiled = conditioned()
    recording, text = recorded(compiled, 1), text_of(1)
    for seed in (1, 2, 1, 3):
        write(text, text_of(seed))
        for passed in (text, text_of(seed)):  # the tensor itself, and a fresh one of the same text
            with compiled.edit(recording, MASK):
                assert_is_dense_inside(compiled, compiled(**inputs_of(passed)), text_of(seed))


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
@pytest.mark.parametrize("record", [False, True])
def test_a_text_rewritten_in_mid_run_is_followed(write: Write, record: bool) -> None:
    compiled = conditioned()
    recording, text = recorded(compiled, 2), text_of(1)
    with compiled.edit(recording, MASK, record=record) as session:
        for seed in (4, 5):
            write(text, text_of(seed))
            assert_is_dense_inside(compiled, compiled(**inputs_of(text)), text_of(seed))
    if record:
        assert session.result is not None
        for call, seed in zip(session.result, (4, 5), strict=True):
            assert torch.equal(call.inputs["text"], text_of(seed))


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_a_recording_is_not_written_to_through_what_was_passed(write: Write) -> None:
    compiled, text = conditioned(), text_of(0)
    with compiled.record() as recording:
        for seed in (6, 7):
            write(text, text_of(seed))
            compiled(**inputs_of(text))
    write(text, text_of(8))
    assert all(torch.equal(call.inputs["text"], text_of(seed)) for call, seed in zip(recording, (6, 7), strict=True))


MASKS = {"none": None, "box": MASK, "empty": torch.zeros_like(MASK), "full": torch.ones_like(MASK)}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("written", range(3))
def test_writing_to_what_was_returned_changes_no_later_call(mask: Tensor | None, record: bool, written: int) -> None:
    """Values computed from the text alone, views of them and of the text included."""
    compiled = conditioned()
    recording = recorded(compiled, 1)
    kept = {name: value.clone() for name, value in recording.calls[0].slots.items()}
    text = text_of(1)
    seen = []
    for _ in range(3):
        with compiled.edit(recording, mask, record=record):
            outputs = compiled(**inputs_of(text.clone()))
        seen.append([value.clone() for value in outputs])
        outputs[written].data.fill_(7.0)
    for again in seen[1:]:
        assert all(map(torch.equal, again, seen[0]))
    assert all(torch.equal(recording.calls[0].slots[name], value) for name, value in kept.items())
