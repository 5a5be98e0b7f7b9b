"""Checks whose outcome is on the device: read when it is there, instead of waiting for it before every launch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fisedit_compiler.tensors.streams import current_stream

TOGETHER = 24
"""Outcomes that are copied to the host in one go: eight calls of a run or so."""

Error = Callable[[], Exception]


@dataclass
class _Pending:
    """Outcomes on their way, bool ``[n]`` on the host, and the error that each stands for."""

    wrong: Tensor
    arrived: torch.cuda.Event | None
    errors: Sequence[Error]


class DeferredChecks:
    """A queue of device-side truth values, each with the error that it stands for.

    On a CUDA device values are copied to the host, a few at a time, behind the work that was launched already;
    :meth:`poll` looks at what has arrived, :meth:`wait` at everything. On other devices a check is read at once.
    """

    def __init__(self) -> None:
        self._gathered: list[tuple[Tensor, Error]] = []
        self._stream: torch.cuda.Stream | None = None
        self._pending: deque[_Pending] = deque()

    def add(self, wrong: Tensor, error: Error) -> None:
        """Raise ``error()`` once ``wrong`` (bool, one element) is known to be true."""
        if not wrong.is_cuda:
            _judge(_Pending(wrong, None, [error]))
            return
        stream = current_stream(wrong.device)
        if stream != self._stream:  # what was computed on another one is copied there
            self._send()
            self._stream = stream
        self._gathered.append((wrong, error))
        if len(self._gathered) >= TOGETHER:
            self._send()

    def poll(self) -> None:
        """Raise the error of the first check that is known to have failed. Waits for nothing."""
        while self._pending and (self._pending[0].arrived is None or self._pending[0].arrived.query()):
            _judge(self._pending.popleft())

    def wait(self) -> None:
        """Raise the error of the first check that failed, once all are known."""
        self._send()
        while self._pending:
            pending = self._pending.popleft()
            if pending.arrived is not None:
                pending.arrived.synchronize()
            _judge(pending)

    def _send(self) -> None:
        gathered, self._gathered = self._gathered, []
        if not gathered:
            return
        host = torch.empty(len(gathered), dtype=torch.bool, device="cpu", pin_memory=True)
        arrived = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            outcomes = torch.stack([wrong if wrong.dim() == 0 else wrong.reshape(()) for wrong, _ in gathered])
            host.copy_(outcomes, non_blocking=True)
            arrived.record(self._stream)
        self._pending.append(_Pending(host, arrived, [error for _, error in gathered]))


def _judge(pending: _Pending) -> None:
    for wrong, error in zip(pending.wrong.reshape(-1).tolist(), pending.errors, strict=True):
        if wrong:
            raise error()
