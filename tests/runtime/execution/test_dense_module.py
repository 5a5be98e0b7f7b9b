"""The module as torch.compile makes it for dense calls inside an edit: whose tensors, and what if it cannot."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fisedit_compiler.runtime.execution.dense_module import DenseModule


class Doubling(nn.Module):
    def forward(self, sample: Tensor) -> tuple[Tensor, int]:
        return 2 * sample, 3


def test_what_a_compiled_call_returns_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph writes every result to the same memory; here a function does."""
    memory, compilations = torch.zeros(3), []

    def compile_to_fixed_memory(module: nn.Module, **options: Any) -> Any:
        compilations.append(options)

        def run(sample: Tensor) -> tuple[Tensor, int]:
            memory.copy_(module(sample)[0])
            return memory, 3

        return run

    monkeypatch.setattr(torch, "compile", compile_to_fixed_memory)
    dense = DenseModule(Doubling())
    assert compilations == [], "nothing is compiled ahead of the first call"
    first, _ = dense(torch.ones(3))
    second, number = dense(torch.full((3,), 5.0))
    assert torch.equal(first, torch.full((3,), 2.0)) and torch.equal(second, torch.full((3,), 10.0))
    assert number == 3
    assert compilations == [{"mode": "reduce-overhead"}]


def test_a_module_that_cannot_be_compiled_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attempts = []

    def refuse(module: nn.Module, **options: Any) -> Any:
        def run(*args: Any) -> None:
            attempts.append(args)
            raise RuntimeError("no compiler here")

        return run

    monkeypatch.setattr(torch, "compile", refuse)
    dense = DenseModule(Doubling())
    for _ in range(2):
        assert torch.equal(dense(torch.ones(3))[0], torch.full((3,), 2.0))
    assert len(attempts) == 1
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "no compiler here" in warnings[0]


def test_a_mistake_of_the_callers_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    with pytest.raises(TypeError):
        DenseModule(Doubling())("no tensor", "and too many")
