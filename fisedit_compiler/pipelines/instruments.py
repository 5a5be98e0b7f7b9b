"""A stopwatch for runs of a pipeline, which does not change what it watches."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def timed_calls(module: torch.nn.Module) -> Iterator[list[float]]:
    """Measure every call of ``module`` inside the block, kernels on the GPU included."""
    seconds: list[float] = []
    started: list[float] = []

    def before(*_: object) -> None:
        _synchronize()
        started.append(time.perf_counter())

    def after(*_: object) -> None:
        _synchronize()
        seconds.append(time.perf_counter() - started.pop())

    handles = (module.register_forward_pre_hook(before), module.register_forward_hook(after))
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
