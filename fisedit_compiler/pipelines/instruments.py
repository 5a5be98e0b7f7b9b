"""A stopwatch for runs of a pipeline, which does not change what it watches, nor what others do with it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from fisedit_compiler.tensors.streams import current_stream

_watching: ContextVar[tuple[int, ...]] = ContextVar("fisedit_timed_calls", default=())
"""Which blocks this context is in."""


@contextmanager
def timed_calls(module: torch.nn.Module) -> Iterator[list[float]]:
    """Measure every call of ``module`` that the block makes; the list is filled when the block has ended well.

    On a CUDA device a call takes from when its first kernel could start to when its last one ended, gaps in which the
    host had launched nothing included. Events note both, so nothing waits for the device until the block ends.
    Elsewhere it is the host's time.
    """
    seconds: list[float] = []
    started: list[_Moment] = []
    calls: list[tuple[_Moment, _Moment]] = []
    block = id(seconds)

    def before(_: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if block in _watching.get():
            started.append(_Moment(_device_of(args, kwargs)))

    def after(_: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: object) -> None:
        if block in _watching.get():
            calls.append((started.pop(), _Moment(_device_of(args, kwargs))))

    outer = _watching.get()
    _watching.set((*outer, block))
    handles = (
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    )
    try:
        yield seconds
    finally:
        _watching.set(outer)
        for handle in handles:
            handle.remove()
    seconds += [start.until(end) for start, end in calls]


class _Moment:
    """A moment of a device's queue of work; on the host, now."""

    def __init__(self, device: torch.device | None) -> None:
        self._time, self._event = time.perf_counter(), None
        if device is not None and device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(current_stream(device))

    def until(self, end: _Moment) -> float:
        """Seconds between two moments; waits until both are over."""
        if self._event is None or end._event is None:
            return end._time - self._time
        end._event.synchronize()
        return float(self._event.elapsed_time(end._event)) / 1000.0


def _device_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.device | None:
    """Where the first tensor among the arguments of a call is."""
    return next((value.device for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
