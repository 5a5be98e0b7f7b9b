"""Capturing a CUDA graph so that a refusal leaves the process as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_refused: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture failed: the allocator goes on asking them which memory is theirs, so they are never freed."""


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: Any = None) -> Iterator[None]:
    """``torch.cuda.graph``, except that after an error the current stream is the one it was before."""
    try:
        # torch.cuda.graph leaves its own stream current where ending the capture fails.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=pool):
            yield
    except BaseException:
        _refused.append(graph)
        raise
