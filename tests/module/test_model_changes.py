"""A model that changes inside a run, or between runs and back: followed where that is right, else refused in words."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fisedit_compiler import SparseModule, SparsifyConfig, sparsify
from fisedit_compiler.errors import RecordingError
from fisedit_compiler.runtime.execution.executable import Executable

SAMPLE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
TEXT = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))
MASK = torch.zeros(8, 8, dtype=torch.bool)
MASK[2:5, 3:6] = True
CALLS = 4


class Processor:
    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.scale


class Net(nn.Module):
    """A convolution, cross-attention whose keys are hoisted, and a processor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.to_k = nn.Linear(6, 8)
        self.conv_out = nn.Conv2d(8, 4, 3, padding=1)
        self.processor: Any = Processor()
        self.scaling = {"a": 1.0}

    def forward(self, sample: Tensor, text: Tensor) -> Tensor:
        hidden = self.conv(sample)
        tokens = hidden.flatten(2).transpose(1, 2)[:, None]
        keys = self.to_k(text)[:, None]
        tokens = tokens + F.scaled_dot_product_attention(tokens, keys, keys) * self.scaling["a"]
        hidden = tokens[:, 0].transpose(1, 2).unflatten(2, hidden.shape[2:])
        return self.conv_out(self.processor(hidden))


@pytest.fixture
def module() -> SparseModule:
    torch.manual_seed(0)
    config = SparsifyConfig(multiple=1, dense_above=1.0, cache=False)
    return sparsify(Net().eval().requires_grad_(False), config, example_inputs={"sample": SAMPLE, "text": TEXT})


def run(module: SparseModule, change: Callable[[nn.Module, int], None] | None = None, text: Tensor = TEXT) -> Tensor:
    outputs = []
    for call in range(CALLS):
        if change is not None:
            change(module.original, call)
        outputs.append(module(SAMPLE, text))
    return torch.stack(outputs)


def swap_processor(net: Any, call: int) -> None:
    net.processor = Processor(1.0 if call < 2 else 3.0)


def scale_processor(net: Any, call: int) -> None:
    net.processor.scale = float(call % 2 + 1)


def scale_adapter(net: Any, call: int) -> None:
    net.scaling["a"] = 1.0 if call < 1 else 0.25


STRUCTURES = {"a processor swapped": swap_processor, "one of its fields": scale_processor, "a scale": scale_adapter}


def tripled(net: Any, call: int) -> None:
    if call == 2:
        net.to_k.weight.mul_(3)


def tripled_by_data(net: Any, call: int) -> None:
    if call == 2:
        net.to_k.weight.data.mul_(3)


def replaced(net: Any, call: int) -> None:
    if call == 2:
        net.conv.weight = nn.Parameter(net.conv.weight * 3)


def reloaded(net: Any, call: int) -> None:
    if call == 2:
        net.load_state_dict({name: value * 3 for name, value in net.state_dict().items()})


WEIGHTS = {"in place": tripled, "by data": tripled_by_data, "replaced": replaced, "loaded": reloaded}


@pytest.mark.parametrize("case", STRUCTURES)
def test_a_structure_that_changes_inside_a_recording_is_followed(module: SparseModule, case: str) -> None:
    change = STRUCTURES[case]
    with module.record() as recording:
        output = run(module, change)
    change(module.original, 0)
    assert torch.equal(output, run(module, change)), "what was recorded is what the module computes"
    change(module.original, 0)
    with module.edit(recording, MASK):
        edited = run(module, change)
    assert torch.allclose(edited, output, atol=1e-5), "an edit that changes it at the same calls is right"


@pytest.mark.parametrize("case", STRUCTURES)
def test_an_edit_whose_structure_changes_otherwise_is_refused(module: SparseModule, case: str) -> None:
    with module.record() as recording:
        output = run(module)
    with pytest.raises(RecordingError, match="not what it was at the recorded call"), module.edit(recording, MASK):
        run(module, STRUCTURES[case])
    net: Any = module.original
    net.processor, net.scaling["a"] = Processor(1.0), 1.0
    with module.edit(recording, MASK):
        assert torch.allclose(run(module), output, atol=1e-5), "nothing is lost"


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_change_inside_a_recording_are_refused(module: SparseModule, case: str) -> None:
    with pytest.raises(RecordingError, match="weights changed inside record"), module.record() as recording:
        run(module, WEIGHTS[case])
    assert not recording.complete
    with module.record() as again:
        output = run(module)
    assert again.complete and torch.equal(output, run(module))


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_change_inside_an_edit_are_refused_and_leave_nothing(module: SparseModule, case: str) -> None:
    other, third = TEXT + 1, TEXT - 1
    with module.record() as recording:
        run(module)
    with module.edit(recording, MASK):
        expected = run(module, text=other)
    kept = {name: value.clone() for name, value in module.original.state_dict().items()}
    with pytest.raises(RecordingError, match="weights changed inside edit"), module.edit(recording, MASK):
        run(module, WEIGHTS[case], text=third)
    module.original.load_state_dict(kept)
    for text in (third, other):
        with module.edit(recording, MASK):
            edited = run(module, text=text)
    assert torch.allclose(edited, expected, atol=1e-6)
    assert module.check(MASK, inputs={"sample": SAMPLE, "text": TEXT})


def test_a_structure_that_comes_back_finds_its_program_and_its_recordings(module: SparseModule) -> None:
    with module.record() as recording:
        output = run(module)
    kept = module.original.conv
    for _ in range(2):
        module.original.conv = nn.Sequential(kept, nn.Conv2d(8, 8, 1))  # type: ignore[assignment]
        module.original.eval()
        with module.record():
            assert torch.equal(run(module), run(module))
        with pytest.raises(RecordingError, match=r"of another model.*conv"), module.edit(recording, MASK):
            pass
        module.original.conv = kept  # type: ignore[assignment]
        with module.edit(recording, MASK):
            assert torch.allclose(run(module), output, atol=1e-5)
        with module.record():
            assert torch.equal(run(module), output)
    assert len(module.programs) == 2


def test_a_part_that_no_longer_exists_is_not_asked_for(module: SparseModule) -> None:
    net: Any = module.original
    with module.record():
        run(module)
    net.extra, net.processor = nn.Conv2d(8, 8, 1), lambda x: net.extra(x)
    net.eval()
    with module.record():
        run(module)
    del net.extra
    net.processor = Processor()
    with module.record() as recording:
        output = run(module)
    assert torch.equal(output, run(module)) and recording.complete


@pytest.mark.parametrize("case", WEIGHTS)
def test_nothing_computed_from_earlier_weights_is_used_again(module: SparseModule, case: str) -> None:
    """Keys and values of a prompt are kept from edit to edit, as long as the weights are the same."""
    other = TEXT + 1

    def edited(subject: SparseModule) -> Tensor:
        with subject.record() as recording:
            run(subject)
        with subject.edit(recording, MASK):
            return run(subject, text=other)

    before = edited(module)
    WEIGHTS[case](module.original, 2)
    after = edited(module)
    config = SparsifyConfig(multiple=1, dense_above=1.0, cache=False)
    fresh = edited(sparsify(copy.deepcopy(module.original), config))
    assert torch.equal(after, fresh) and not torch.allclose(after, before)


def bound(module: SparseModule) -> dict[str, Any]:
    """What the only program of a module computes with, by path."""
    (executable,) = module._programs.executables()
    return executable._attributes


def test_entering_walks_to_no_weight_that_is_where_it_was(
    module: SparseModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    walked: list[str] = []
    resolve = Executable._resolve

    def noted(executable: Executable, name: str) -> Any:
        walked.append(name)
        return resolve(executable, name)

    monkeypatch.setattr(Executable, "_resolve", noted)
    with module.record() as recording:
        run(module)
    for _ in range(2):
        walked.clear()
        with module.edit(recording, MASK):
            run(module)
    assert bound(module) and not walked


def test_a_weight_exchanged_for_an_equal_one_is_the_one_that_runs_use(module: SparseModule) -> None:
    with module.record() as recording:
        run(module)
    weight = module.original.conv.weight = nn.Parameter(module.original.conv.weight.clone(), requires_grad=False)
    with module.edit(recording, MASK):
        run(module)
        assert bound(module)["conv.weight"] is weight


def test_a_weight_that_was_another_while_a_program_took_it_is_let_go(module: SparseModule) -> None:
    """A thread may exchange one and put it back between two looks, while another thread binds a program."""
    with module.record() as recording:
        output = run(module)
    bound(module)["conv.weight"] = nn.Parameter(module.original.conv.weight * 3)
    with module.edit(recording, MASK):
        assert torch.allclose(run(module), output, atol=1e-5)
        assert bound(module)["conv.weight"] is module.original.conv.weight
