"""A module to be in modes of."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from fisedit_compiler import SparseModule, SparsifyConfig, sparsify
from tests.support.modes import SAMPLE


@pytest.fixture(scope="module")
def shared() -> SparseModule:
    torch.manual_seed(0)
    module = nn.Conv2d(3, 3, 3, padding=1).eval()
    return sparsify(module, SparsifyConfig(), example_inputs={"input": SAMPLE})


@pytest.fixture
def compiled(shared: SparseModule) -> Iterator[SparseModule]:
    yield shared
    assert "in no mode" in repr(shared)
    with shared.record() as recording:
        assert torch.equal(shared(SAMPLE), shared.original(SAMPLE))
    assert recording.complete and recording.num_calls == 1
