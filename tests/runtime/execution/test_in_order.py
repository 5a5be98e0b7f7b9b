"""Streams of several threads one after another, with stand-ins for streams and events; on a GPU, with its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from fisedit_compiler.runtime.execution import in_order
from fisedit_compiler.runtime.execution.in_order import InOrder
from tests.support.runs import together


@dataclass(eq=False)
class Stream:
    device: torch.device
    waited_for: list[Any] = field(default_factory=list)

    def wait_event(self, event: Event) -> None:
        self.waited_for.append(event.stream)


@dataclass
class Event:
    """As CUDA's, it is of the device where it is recorded first."""

    stream: Stream | None = None

    def record(self, stream: Stream) -> None:
        assert self.stream is None or self.stream.device == stream.device
        self.stream = stream


def test_a_stream_waits_for_what_another_one_launched_last(monkeypatch: pytest.MonkeyPatch) -> None:
    first_gpu, second_gpu = torch.device("cuda:0"), torch.device("cuda:1")
    one, other, elsewhere = Stream(first_gpu), Stream(first_gpu), Stream(second_gpu)
    current = [one]
    monkeypatch.setattr(in_order, "current_stream", lambda device: current[0])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    shared = InOrder()
    for stream in (one, one, other, one, elsewhere, elsewhere, other):
        current[0] = stream
        with shared.on(stream.device):
            pass
    assert one.waited_for == [other]
    assert elsewhere.waited_for == [one]
    assert other.waited_for == [one, elsewhere]


def test_one_thread_at_a_time_whatever_is_raised() -> None:
    shared, inside = InOrder(), list[int]()

    def use() -> None:
        for _ in range(50):
            try:
                with shared.on(torch.device("cpu")):
                    inside.append(1)
                    assert len(inside) == 1
                    inside.pop()
                    raise KeyError
            except KeyError:
                pass

    together([use] * 4)
