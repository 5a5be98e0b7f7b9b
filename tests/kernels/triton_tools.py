"""How a Triton kernel is tested: in the interpreter on the CPU, for real on a GPU, its outputs poisoned."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def run_in_the_interpreter(module: str, *arguments: str) -> None:
    """Run a test module as a program with ``TRITON_INTERPRET=1``, which must be set before Triton is imported."""
    result = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is allocated and not written holds NaN: torch fills it in its deterministic mode."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)
