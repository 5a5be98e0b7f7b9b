"""The stopwatch: every call of its block, in order, without waiting for a device before the block is over."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fisedit_compiler.pipelines.instruments import timed_calls


class Slow(nn.Module):
    """Takes as many milliseconds as it is told."""

    def forward(self, sample: Tensor, milliseconds: float = 0.0) -> Tensor:
        time.sleep(milliseconds / 1000.0)
        return sample + 1


SAMPLE = torch.ones(2)


def test_every_call_in_order() -> None:
    module = Slow()
    with timed_calls(module) as seconds:
        for milliseconds in (0.0, 60.0, 5.0):
            module(SAMPLE, milliseconds)
        module(sample=SAMPLE, milliseconds=30.0)
    assert len(seconds) == 4
    assert seconds[1] >= 0.06 > seconds[0] and seconds[2] >= 0.005 and seconds[3] >= 0.03
    module(SAMPLE)
    assert len(seconds) == 4


def test_a_call_that_raises_counts_for_nothing() -> None:
    module = Slow()
    with timed_calls(module) as seconds:
        with pytest.raises(TypeError):
            module(None)
        module(SAMPLE)
    assert len(seconds) == 1


def test_a_block_that_raises_waits_for_nothing() -> None:
    module = Slow()
    with pytest.raises(KeyboardInterrupt), timed_calls(module) as seconds:
        module(SAMPLE)
        raise KeyboardInterrupt
    assert seconds == []
    assert not module._forward_hooks and not module._forward_pre_hooks


@pytest.mark.gpu
def test_on_a_gpu_it_measures_kernels_and_waits_for_none_of_them() -> None:
    class Busy(nn.Module):
        def forward(self, sample: Tensor) -> Tensor:
            torch.cuda._sleep(50_000_000)  # cycles, more than 20 ms
            return sample + 1

    module, sample = Busy(), torch.ones(2, device="cuda")
    module(sample)
    torch.cuda.synchronize()
    with timed_calls(module) as seconds:
        started = time.perf_counter()
        torch.cuda.set_sync_debug_mode("error")
        try:
            results: list[Any] = [module(sample) for _ in range(3)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        launched = time.perf_counter() - started
    assert len(results) == len(seconds) == 3
    assert launched < 0.02 < min(seconds)
