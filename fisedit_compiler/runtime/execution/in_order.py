"""What several runs share on a device, used by one thread at a time and in that order on the device, too.

Threads may launch on streams of their own. A graph's buffers are filled, replayed and read by whoever holds the lock,
but the device goes on working after it was given back; so the next thread's stream waits for what the last one
launched. On a CPU work is over when a call returns.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from fisedit_compiler.tensors.streams import current_stream


class InOrder:
    """A re-entrant lock that orders the streams of those who take it one after another."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._last: torch.cuda.Stream | None = None
        self._launched: torch.cuda.Event | None = None

    def on(self, device: torch.device) -> AbstractContextManager[Any]:
        """Inside the block the calling thread alone uses what is shared on the device."""
        if device.type == "cuda":
            return self._ordered(device)
        lock: AbstractContextManager[Any] = self._lock
        return lock

    @contextmanager
    def _ordered(self, device: torch.device) -> Iterator[None]:
        with self._lock:
            stream = current_stream(device)
            if self._launched is not None and self._last != stream:
                stream.wait_event(self._launched)
            try:
                yield
            finally:
                if self._launched is None or self._last is None or self._last.device != stream.device:
                    self._launched = torch.cuda.Event()  # it belongs to the device where it is recorded first
                self._launched.record(stream)
                self._last = stream
