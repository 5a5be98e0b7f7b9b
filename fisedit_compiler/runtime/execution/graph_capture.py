"""Capturing a CUDA graph so that a refusal leaves the process as it was, and other threads go on meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch

from fisedit_compiler.progress import compiling

_MODE = "thread_local"
"""What this thread does may break a capture; allocations and copies of other threads' runs do not."""

_refused: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture failed: the allocator goes on asking them which memory is theirs, so they are never freed."""


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: Any = None, stream: torch.cuda.Stream | None = None) -> Iterator[None]:
    """``torch.cuda.graph``, except that after an error the current stream and random numbers are as they were."""
    try:
        # torch.cuda.graph leaves its own stream current where ending the capture fails.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=pool, stream=stream or _capture_stream(), capture_error_mode=_MODE),
        ):
            yield
    except BaseException:
        _refused.append(graph)
        _free_generators()
        raise


def capture_into(
    graph: torch.cuda.CUDAGraph, body: Callable[[], list[Any]], memory: Any = None, what: str = "sparse calls"
) -> list[Any]:
    """Compile a function by running it, then capture it.

    Args:
        graph: not captured yet.
        body: what it will replay; it compiles at its first call.
        memory: a pool of another graph to share; it ends with the last graph in it.
        what: is compiled for, for the progress bar.

    Returns:
        What ``body`` returned while it was captured: every replay writes there.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with compiling("Inductor", what=what), torch.cuda.stream(stream):
        for _ in range(2):
            body()
    torch.cuda.current_stream().wait_stream(stream)
    with compiling("CUDA graph", what=what), capturing(graph, memory):
        return body()


def _capture_stream() -> torch.cuda.Stream:
    """The device's stream for captures, on which no other thread is likely to launch meanwhile.

    torch gives its streams out again and again; those of high priority, which programs hardly ask for, are others. It
    is one, since libraries keep a workspace for every stream.
    """
    return _stream_of(torch.cuda.current_device() if torch.cuda.is_initialized() else None)


@cache
def _stream_of(device: int | None) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


def _free_generators() -> None:
    """Let random numbers be drawn again.

    A capture that CUDA refuses leaves torch's generators inside it ("Offset increment outside graph capture"). Nothing
    takes them out but the end of a capture that succeeds.
    """
    if not torch.cuda.is_initialized():
        return
    with suppress(RuntimeError), torch.cuda.stream(torch.cuda.current_stream()):
        value = torch.zeros(1, device="cuda")
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=_capture_stream(), capture_error_mode=_MODE):
            value += 1
