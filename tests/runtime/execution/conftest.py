"""The pair that tests of CUDA graphs compare."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.support.graph_pair import (
    Pair,
    shared_pair,
)
from tests.support.graph_stand_in import patch_cuda, traced_compile


@pytest.fixture(params=["stand-in", pytest.param("cuda", marks=pytest.mark.gpu)])
def pair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    """One tiny UNet, in float32, so that the tolerance is tight, and never compiled a second time."""
    if request.param == "stand-in":
        patch_cuda(monkeypatch, traced_compile)
    shared = shared_pair("sd15", torch.float32, "cpu" if request.param == "stand-in" else "cuda")
    for module in (shared.graphs, shared.eager):
        for executable in module._programs._executables.values():
            executable.hoisted.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield shared
