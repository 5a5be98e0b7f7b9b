"""Bundles evaluated by CUDA graphs give the eager values: with a stand-in for graphs on the CPU, and on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fisedit_compiler.kernels.addresses import is_plain
from fisedit_compiler.passes.programs.hoist import Bundle
from fisedit_compiler.runtime.execution import bundle_graphs
from fisedit_compiler.runtime.execution.bundle_graphs import BundleRunner
from fisedit_compiler.runtime.execution.bundle_values import BundleValues, FlatValues
from tests.support.graph_stand_in import patch_cuda


class Projections(nn.Module):
    """Values of many layouts: dense, transposed, a strided part, an expanded one, an odd number of bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 10), nn.Linear(6, 4)

    def forward(self, text: Tensor, batch: int) -> tuple[Tensor, ...]:
        keys = self.first(text).unflatten(2, (2, 5)).transpose(1, 2)
        parts = self.second(text).split(2, dim=2)
        return keys, parts[0], parts[1], text.mean().expand(batch, 3), text[:, :, :1].round().to(torch.uint8)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "cpu":
        patch_cuda(monkeypatch)
        monkeypatch.setattr(BundleRunner, "_capturable", lambda self, arguments: True)
        # The stand-in captures nothing by itself: what it must run again is handed to it.
        monkeypatch.setattr(bundle_graphs._BundleGraph, "run", _run_eagerly)
    yield request.param


def _run_eagerly(graph: bundle_graphs._BundleGraph, arguments: list[object]) -> FlatValues:
    torch._foreach_copy_(graph.where.views(graph.flat), list(graph.module(*arguments)))
    return FlatValues(graph.where, graph.flat.clone())


def evaluated(runner: BundleRunner, bundle: Bundle, module: nn.Module, arguments: list[Any]) -> BundleValues:
    """The values for a call; what is worth a graph is captured behind it."""
    values = runner.run(bundle, module, arguments)
    runner.capture_wanted(nullcontext())
    return values


def bundle_of(names: set[str]) -> Bundle:
    return Bundle("+".join(sorted(names)), frozenset(names), fx.Graph(), ("keys", "a", "b", "mean", "bytes"))


@torch.no_grad()
def test_values_are_the_eager_ones_and_belong_to_their_group(device: str) -> None:
    module = Projections().to(device)
    runner, bundle = BundleRunner(graphs=True), bundle_of({"text"})
    seen = []
    for seed in range(5):
        text = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(seed)).to(device)
        group = evaluated(runner, bundle, module, [text, 2])
        assert tuple(group) == bundle.values and len(group) == 5 and "keys" in group and "text" not in group
        values = [group[name] for name in group]
        seen.append((group, values, [value.clone() for value in values], module(text, 2)))
    assert len({group.layout for group, *_ in seen}) == 1, "a graph of the step is captured once for all of them"
    for group, values, copies, expected in seen:
        assert group.addresses.tolist() == [value.data_ptr() for value in values]
        assert group.nbytes >= sum(value.nbytes for value in values)
        for value, copied, eager in zip(values, copies, expected, strict=True):
            assert torch.equal(value, copied), "a later prompt wrote to an earlier one's values"
            torch.testing.assert_close(value, eager)
        assert all(is_plain(value) for value in values[:4])
    (graph,) = runner._captured.values()
    assert graph is not None
    evaluated(runner, bundle, module, [text[:1], 1])
    assert len(runner._captured) == 2, "inputs of another form"


@torch.no_grad()
def test_what_is_computed_once_is_not_captured(device: str) -> None:
    module = Projections().to(device)
    text = torch.randn(2, 7, 6, device=device)
    runner = BundleRunner(graphs=True)
    evaluated(runner, bundle_of({"text"}), module, [text, 2])
    assert list(runner._captured.values()) == [None]
    for _ in range(3):
        evaluated(runner, bundle_of(set()), module, [text, 2])
    assert list(runner._captured.values()) == [None], "values of the weights alone"
    eager = BundleRunner(graphs=False)
    for _ in range(3):
        evaluated(eager, bundle_of({"text"}), module, [text, 2])
    assert not eager._captured


@torch.no_grad()
@pytest.mark.parametrize("raised", [torch.cuda.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_memory_that_runs_out_while_capturing_is_said_once(
    raised: Exception, device: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = Projections().to(device)
    runner, bundle = BundleRunner(graphs=True), bundle_of({"text"})

    def runs_out(*_: object) -> None:
        raise raised

    monkeypatch.setattr(bundle_graphs, "_BundleGraph", runs_out)
    for seed in range(4):
        text = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(seed)).to(device)
        group = evaluated(runner, bundle, module, [text, 2])
        for name, eager in zip(bundle.values, module(text, 2), strict=True):
            torch.testing.assert_close(group[name], eager)
    assert [record.message for record in caplog.records if "memory ran out" in record.message]
    assert len(caplog.records) == 1
