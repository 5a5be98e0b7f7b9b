"""A tiny pipeline on the bench, and evaluations of it in a folder of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from evaluation_tools import PAIRS, STEPS

from fisedit_compiler.evaluation.measures.judge import Judge
from fisedit_compiler.evaluation.methods.bench import Bench
from fisedit_compiler.evaluation.runner import Evaluation, Runner
from fisedit_compiler.models import load_clip
from tests.support.tiny_pipeline import PinnedUNet, make_tiny_pipeline


@pytest.fixture(scope="session")
def judge() -> Judge:
    return Judge(load_clip())


@pytest.fixture
def tiny_pipe() -> Any:
    return make_tiny_pipeline()


@pytest.fixture
def bench(tiny_pipe: Any, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A bench whose compiled UNets are stand-ins."""
    monkeypatch.setattr("fisedit_compiler.api.sparsify", lambda unet, config=None: PinnedUNet(unet))
    return Bench(tiny_pipe)


@pytest.fixture
def evaluation(tmp_path: Path, bench: Bench, judge: Judge, monkeypatch: pytest.MonkeyPatch) -> Iterator[Evaluation]:
    """An evaluation of three pairs on the tiny pipeline, by few methods."""

    def load(cls: type[Runner], *arguments: Any) -> Runner:
        return cls(*arguments, bench, judge)

    monkeypatch.setattr(Runner, "load", classmethod(load))
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    methods = ("dense", "sparse", "sdedit@0.5")
    yield Evaluation(pairs, tmp_path / "out", methods=methods, steps=STEPS)


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, BaseException], Callable[[], None]]:
    """Let the n-th pair's base raise; returns a function that mends it."""

    def arrange(number: int, error: BaseException) -> Callable[[], None]:
        original = Runner._case
        runs = 0

        def failing(self: Runner, *arguments: Any) -> Any:
            nonlocal runs
            runs += 1
            if runs == number:
                raise error
            return original(self, *arguments)

        monkeypatch.setattr(Runner, "_case", failing)
        return lambda: monkeypatch.setattr(Runner, "_case", original)

    return arrange
