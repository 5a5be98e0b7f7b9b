"""Checks whose outcome is on the device: read when it is there, instead of waiting for it before every launch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class _Pending:
    wrong: Tensor
    arrived: torch.cuda.Event | None
    error: Callable[[], Exception]


class DeferredChecks:
    """A queue of device-side truth values, each with the error that it stands for.

    On a CUDA device a value is copied to the host behind the work that was launched already; :meth:`poll` looks at
    what has arrived, :meth:`wait` at everything. On other devices a check is read at once.
    """

    def __init__(self) -> None:
        self._pending: deque[_Pending] = deque()

    def add(self, wrong: Tensor, error: Callable[[], Exception]) -> None:
        """Raise ``error()`` once ``wrong`` (bool, one element) is known to be true."""
        if not wrong.is_cuda:
            _judge(_Pending(wrong, None, error))
            return
        host = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
        host.copy_(wrong.reshape(()), non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._pending.append(_Pending(host, arrived, error))

    def poll(self) -> None:
        """Raise the error of the first check that is known to have failed. Waits for nothing."""
        while self._pending and (self._pending[0].arrived is None or self._pending[0].arrived.query()):
            _judge(self._pending.popleft())

    def wait(self) -> None:
        """Raise the error of the first check that failed, once all are known."""
        while self._pending:
            pending = self._pending.popleft()
            if pending.arrived is not None:
                pending.arrived.synchronize()
            _judge(pending)


def _judge(pending: _Pending) -> None:
    if bool(pending.wrong):
        raise pending.error()
