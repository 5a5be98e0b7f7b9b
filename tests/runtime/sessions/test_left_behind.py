"""A forward that goes by what its earlier calls left behind is refused; one that only leaves it there is right.

Every forward of ``REFUSED`` is refused at the first call or, where nobody could know, at the call that is another.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor

from fisedit_compiler import SparseModule, SparsifyConfig, sparsify
from fisedit_compiler.capture.keys.drawn import state_of
from fisedit_compiler.errors import CaptureError, RecordingError
from tests.support import noting
from tests.support.noting import CHOICE, LATE, MASK, REFUSED, REGISTRY, RIGHT, SAMPLE, Controller, Net, counts, numbers


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(Controller, "calls", 0)
    monkeypatch.setattr(noting, "COUNT", 0)
    REGISTRY.clear()
    token = CHOICE.set(0)
    yield
    CHOICE.reset(token)


def compiled(forward: Callable[[Net, Tensor], Tensor]) -> SparseModule:
    torch.manual_seed(0)
    net = type("Net", (Net,), {"forward": forward})().eval()
    config = SparsifyConfig(multiple=1, dense_above=1.0, cache=False)
    return sparsify(net, config, example_inputs={"sample": SAMPLE})


@pytest.mark.filterwarnings("ignore:The tensor attribute")
@pytest.mark.parametrize("case", REFUSED)
def test_what_goes_by_its_earlier_calls_is_refused(case: str) -> None:
    with pytest.raises(CaptureError, match=r"Net may compute something else at every call.*writes to what it reads"):
        module = compiled(REFUSED[case])
        with module.record():
            for _ in range(LATE + 5):
                module(SAMPLE)


@pytest.mark.filterwarnings("ignore:The tensor attribute")
@pytest.mark.parametrize("forward", RIGHT)
def test_what_leaves_only_things_behind_is_right(forward: Callable[[Net, Tensor], Tensor]) -> None:
    module = compiled(forward)
    samples = [SAMPLE * number for number in range(1, LATE + 5)]
    with module.record() as recording:
        outputs = [module(sample) for sample in samples]
    assert len(module.programs) == 1
    assert all(torch.equal(left, module.original(right)) for left, right in zip(outputs, samples, strict=True))
    with module.edit(recording, MASK):
        for sample, output in zip(samples, outputs, strict=True):
            torch.testing.assert_close(module(sample), output)


def test_after_the_check_it_is_as_if_the_module_was_called_once() -> None:
    module = compiled(counts)
    net = module.original

    def left() -> list[Any]:
        return [net.step, net.controller.settings["step"], -net.slotted.step, net.steps[0], Controller.calls]

    before = left()
    with module.record():
        module(SAMPLE)
    assert left() == [number + 1 for number in before]
    assert all(type(number) is int for number in left())


@pytest.mark.parametrize("in_place", [True, False])
def test_writing_to_a_buffer_is_refused_by_name_and_leaves_it_as_it_was(in_place: bool) -> None:
    def forward(self: Net, sample: Tensor) -> Tensor:
        if in_place:
            self.total.add_(1)
        else:
            self.total = self.total + 1
        return self.conv(sample) * torch.where(self.total > LATE, 2.0, 1.0)

    net = type("Net", (Net,), {"forward": forward})().eval()
    net.register_buffer("total", torch.zeros(1))
    buffer = net.total
    with pytest.raises(CaptureError, match="writes to its buffers: total"):
        sparsify(net, SparsifyConfig(multiple=1, cache=False), example_inputs={"sample": SAMPLE})
    assert net.total is buffer and torch.equal(buffer, torch.zeros(1))


@pytest.mark.parametrize("name", ["iterator", "counter", "generator", "zipped", "random", "legacy", "modern"])
def test_a_draw_shows(name: str) -> None:
    value = getattr(Net(), name)
    before = state_of(value)
    assert before is not None and state_of(value) == before
    next(value) if hasattr(value, "__next__") else value.random(1) if name != "random" else value.random()
    assert state_of(value) != before


def test_other_things_have_no_such_state() -> None:
    exhausted = numbers()
    exhausted.close()
    assert state_of(exhausted) == "at its end"
    assert [state_of(value) for value in (1, "a", [1], Net(), SAMPLE)] == [None] * 5


# -- what stays as the first call left it, and is looked at -------------------------------------------------


class Lazy(Net):
    """Makes what it computes with when it is first called, each kind in its own way."""

    @cached_property
    def cached(self) -> float:
        return 2.0

    def forward(self, sample: Tensor) -> Tensor:
        if not hasattr(self, "scale"):
            self.scale, self.weights, self.note = 2.0, torch.ones(4, 1, 1) * 2, sample.shape
            self.store["scale"] = 2.0
        return self.conv(sample) * self.scale * self.weights * self.cached * self.store["scale"]


LATER: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda net: setattr(net, "scale", 3.0),
    "cached property": lambda net: net.__dict__.update(cached=3.0),
    "entry": lambda net: net.store.update(scale=3.0),
    "tensor replaced": lambda net: setattr(net, "weights", net.weights * 2),
    "tensor written to": lambda net: net.weights.mul_(2),
}


@pytest.mark.filterwarnings("ignore:The tensor attribute")
@pytest.mark.parametrize("case", LATER)
def test_what_the_first_call_made_is_still_the_models(case: str) -> None:
    torch.manual_seed(0)
    config = SparsifyConfig(multiple=1, dense_above=1.0, cache=False)
    module = sparsify(Lazy().eval(), config, example_inputs={"sample": SAMPLE})
    with module.record() as recording:
        for _ in range(3):
            output = module(SAMPLE)
    with module.edit(recording, MASK):
        for _ in range(3):
            torch.testing.assert_close(module(SAMPLE), output)
    assert len(module.programs) == 1, "that it was made is no change"
    LATER[case](module.original)
    with pytest.raises(RecordingError, match="of another model"), module.edit(recording, MASK):
        pass
    with module.record():
        again = module(SAMPLE)
    assert torch.equal(again, module.original(SAMPLE)) and not torch.equal(again, output)


def test_what_is_kept_for_one_size_is_no_change_at_another() -> None:
    def forward(self: Net, sample: Tensor) -> Tensor:
        if self.size != sample.shape[2]:
            self.size, self.kept = sample.shape[2], torch.arange(sample.shape[2])[:, None]
        return self.conv(sample) * self.kept

    module, larger = compiled(forward), torch.ones(1, 4, 12, 12)
    with module.record() as recording:
        output = module(SAMPLE)
    for _ in range(2):
        with module.record() as other:
            assert torch.equal(module(larger), module.original(larger))
        with module.record():
            assert torch.equal(module(SAMPLE), output)
        with module.edit(recording, MASK):
            torch.testing.assert_close(module(SAMPLE), output)
        with module.edit(other, torch.ones(12, 12, dtype=torch.bool)):
            module(larger)


def test_a_count_that_matters_in_a_later_recording_spoils_no_earlier_one() -> None:
    """From its twelfth call on, the module is another: recordings of the first one are not edited with it."""
    module = compiled(REFUSED["counts"])
    with module.record() as recording:
        output = module(SAMPLE)
    with module.edit(recording, MASK):
        torch.testing.assert_close(module(SAMPLE), output)
    module.original.step = LATE + 5
    with module.record() as later:
        assert torch.equal(module(SAMPLE), output * 2)
        assert torch.equal(module(SAMPLE), output * 2)
    with pytest.raises(RecordingError, match="of another model"), module.edit(recording, MASK):
        pass
    with module.edit(later, MASK):
        torch.testing.assert_close(module(SAMPLE), output * 2)
        torch.testing.assert_close(module(SAMPLE), output * 2)


def test_labels_and_timesteps_are_other_ones_in_between() -> None:
    class Conditioned(Net):
        """Keeps what it made of the first label or timestep."""

        def forward(self, sample: Tensor, label: Tensor) -> Tensor:
            if self.kept is None:
                self.kept = label * 1.0
            return self.conv(sample) * self.kept.reshape(-1, 1, 1, 1)

    for label in (torch.tensor([4]), torch.tensor(4.0), torch.tensor(4)):
        inputs = {"sample": SAMPLE, "label": label}
        module = sparsify(Conditioned().eval(), SparsifyConfig(multiple=1, cache=False), example_inputs=inputs)
        with pytest.raises(CaptureError, match="writes to what it reads"), module.record():
            module(**inputs)
