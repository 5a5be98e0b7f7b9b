"""Where text encoders are captured, and how often a graph of one was used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fisedit_compiler.pipelines.running.encoder_graphs import _EncoderGraph
from tests.support.graph_stand_in import patch_encoder_graphs


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        patch_encoder_graphs(monkeypatch)
    found: str = request.param
    return found


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[None]]:
    """One for every text that a graph encoded."""
    found: list[None] = []
    run = _EncoderGraph.run

    def counted(graph: _EncoderGraph, arguments: Any) -> Any:
        found.append(None)
        return run(graph, arguments)

    monkeypatch.setattr(_EncoderGraph, "run", counted)
    yield found
