"""Checks whose outcome arrives later: nothing waits for them, and none is lost."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from fisedit_compiler import SparsifyConfig, sparsify
from fisedit_compiler.errors import RecordingError
from fisedit_compiler.runtime.sessions.agreement import CHECKED_AT_ONCE
from fisedit_compiler.tensors import deferred
from fisedit_compiler.tensors.deferred import TOGETHER, DeferredChecks, _Pending
from tests.support.compiled_zoo import make_mask
from tests.support.zoo import ZOO


@dataclass
class Event:
    """Stands for ``torch.cuda.Event``: a copy that arrives when it is told to, or waited for."""

    done: bool = False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done = True


def queue(*outcomes: bool) -> tuple[DeferredChecks, list[Event]]:
    """Checks under way, named by their number."""
    checks, events = DeferredChecks(), [Event() for _ in outcomes]
    for number, (wrong, event) in enumerate(zip(outcomes, events, strict=True)):
        error = RecordingError(f"check {number}")
        checks._pending.append(_Pending(torch.tensor(wrong), event, [lambda error=error: error]))  # type: ignore[arg-type, misc]
    return checks, events


def test_on_a_cpu_a_check_is_read_at_once() -> None:
    checks = DeferredChecks()
    checks.add(torch.tensor(False), lambda: RecordingError("not this"))
    with pytest.raises(RecordingError, match="this"):
        checks.add(torch.tensor([True]), lambda: RecordingError("this"))
    checks.wait()


def test_polling_waits_for_nothing() -> None:
    checks, events = queue(False, True)
    checks.poll()
    events[1].done = True
    checks.poll()  # the first is still under way; outcomes are judged in order
    events[0].done = True
    with pytest.raises(RecordingError, match="check 1"):
        checks.poll()
    checks.wait()


def test_waiting_raises_the_first_failure() -> None:
    checks, _ = queue(False, True, True)
    with pytest.raises(RecordingError, match="check 1"):
        checks.wait()


class Fake:
    """Stands for a tensor on a CUDA device, whose outcome is known here."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self, wrong: bool) -> None:
        self.wrong = wrong


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, int]]:
    """The streams on which outcomes were sent, and how many at once."""
    streams: list[tuple[object, int]] = []

    def send(checks: DeferredChecks) -> None:
        gathered, checks._gathered = checks._gathered, []
        if gathered:
            streams.append((checks._stream, len(gathered)))
            outcomes = torch.tensor([fake.wrong for fake, _ in gathered])  # type: ignore[attr-defined]
            checks._pending.append(_Pending(outcomes, None, [error for _, error in gathered]))

    monkeypatch.setattr(DeferredChecks, "_send", send)
    return streams


def test_a_few_outcomes_are_sent_together_and_none_is_lost(
    sent: list[tuple[object, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deferred, "current_stream", lambda device: "one")
    checks = DeferredChecks()
    for number in range(TOGETHER + 3):
        error = RecordingError(f"check {number}")
        checks.add(Fake(number == TOGETHER + 1), lambda error=error: error)  # type: ignore[arg-type, misc]
    checks.poll()
    assert sent == [("one", TOGETHER)]
    with pytest.raises(RecordingError, match=f"check {TOGETHER + 1}"):
        checks.wait()
    assert sent == [("one", TOGETHER), ("one", 3)]
    checks.wait()


def test_outcomes_are_sent_on_the_stream_that_computes_them(
    sent: list[tuple[object, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = DeferredChecks()
    for stream in ("one", "one", "other", "one"):
        monkeypatch.setattr(deferred, "current_stream", lambda device, stream=stream: stream)
        checks.add(Fake(False), RecordingError)  # type: ignore[arg-type]
    checks.wait()
    assert sent == [("one", 2), ("other", 1), ("one", 1)]


@pytest.mark.gpu
@pytest.mark.parametrize("mistake", ["sample", "timestep"])
def test_on_a_gpu_a_late_mistake_ends_the_edit(mistake: str) -> None:
    """A call past those that are checked before they run: the error names it, and the recording can be edited again."""
    model, size, calls = ZOO["sd15"](), (16, 16), CHECKED_AT_ONCE + 2
    compiled = sparsify(model.module.to("cuda"), SparsifyConfig(dense_above=1.0))
    inputs = {
        key: value.cuda() if isinstance(value, torch.Tensor) else value
        for key, value in model.make_inputs(2, *size, 0).items()
    }
    mask = make_mask("block", size)

    def run(wrong: int | None) -> None:
        for call in range(calls):
            given = {**inputs, "timestep": torch.tensor(900.0 - 100 * call, device="cuda")}
            if call == wrong:
                given[mistake] = given[mistake] + 1
            compiled(**given)

    with compiled.record() as recording:
        run(None)
    with pytest.raises(RecordingError, match=rf"[Cc]all {CHECKED_AT_ONCE}"), compiled.edit(recording, mask):
        run(CHECKED_AT_ONCE)
    with compiled.edit(recording, mask):
        run(None)
