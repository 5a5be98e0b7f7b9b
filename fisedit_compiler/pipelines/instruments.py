"""A stopwatch for runs of a pipeline, which does not change what it watches, nor what others do with it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_watching: ContextVar[tuple[int, ...]] = ContextVar("fisedit_timed_calls", default=())
"""Which blocks this context is in."""


@contextmanager
def timed_calls(module: torch.nn.Module) -> Iterator[list[float]]:
    """Measure every call of ``module`` that the block makes, kernels on the GPU included."""
    seconds: list[float] = []
    started: list[float] = []
    block = id(seconds)

    def before(*_: object) -> None:
        if block in _watching.get():
            _synchronize()
            started.append(time.perf_counter())

    def after(*_: object) -> None:
        if block in _watching.get():
            _synchronize()
            seconds.append(time.perf_counter() - started.pop())

    outer = _watching.get()
    _watching.set((*outer, block))
    handles = (module.register_forward_pre_hook(before), module.register_forward_hook(after))
    try:
        yield seconds
    finally:
        _watching.set(outer)
        for handle in handles:
            handle.remove()


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
