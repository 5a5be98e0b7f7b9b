"""Every test of this folder starts without graphs of Dynamo."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests() -> Iterator[None]:
    """Dynamo keeps graphs per line of code, so that two tests with a UNet of their own share a limit."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
