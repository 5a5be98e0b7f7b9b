"""Copies to the device that nobody waits for.

A scheduler that draws noise from the run's generator draws it on the host and copies it; some copy a few coefficients
at every step. torch waits for the device at such a copy, because the host could write to what is being copied. Here the
copy is made from memory of its own, which the device can read by itself, so nothing has to be waited for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

LOOKED_AT = 4
"""Blocks of one row that are looked at; if none of them copied anything the others are not."""


class CopiesBehind:
    """A row of blocks, such as the steps of a run, in which nobody waits for copies from the host to a CUDA device.

    Those are meant that ``Tensor.to`` and ``torch.tensor`` make. Looking at every function that a block calls takes the
    host longer than many a block itself, so what copies nothing in its first blocks is left alone.
    """

    def __init__(self) -> None:
        self._blocks, self._copied = 0, False

    @contextmanager
    def block(self, device: torch.device | None) -> Iterator[None]:
        """One of them; ``device`` is where it computes."""
        if device is None or not is_behind(device) or (self._blocks >= LOOKED_AT and not self._copied):
            yield
            return
        mode = _Copies()
        try:
            with mode:
                yield
        finally:
            self._blocks += 1
            self._copied |= mode.copied


class _Copies(TorchFunctionMode):
    """Lets copies to the device start from pinned memory."""

    def __init__(self) -> None:
        super().__init__()
        self.copied = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.to and _can_be_pinned(args[0]) and "non_blocking" not in kwargs and len(args) < 4:
            target = _target((*args[1:], *kwargs.values()))
            if target is not None and is_behind(target):
                self.copied = True
                return function(pinned(args[0]), *args[1:], **{**kwargs, "non_blocking": True})
        elif function is torch.tensor and args and not _holds_tensors(args[0]):
            target = _target((kwargs.get("device"),))
            if target is not None and is_behind(target):
                self.copied = True
                return pinned(function(*args, **{**kwargs, "device": "cpu"})).to(target, non_blocking=True)
        return function(*args, **kwargs)


def is_behind(device: torch.device) -> bool:
    """Whether a device computes behind the host."""
    return device.type == "cuda"


def pinned(value: Tensor) -> Tensor:
    """A copy in memory that a CUDA device reads by itself; it is kept until that is done."""
    # torch pins in the layout as it is, and cannot write to elements that share memory (``expand``).
    expanded = any(size > 1 and not stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return (value.contiguous() if expanded else value).pin_memory()


def _can_be_pinned(value: Tensor) -> bool:
    return value.device.type == "cpu" and value.layout is torch.strided


def _target(arguments: tuple[Any, ...]) -> torch.device | None:
    """The device among the arguments of ``to``."""
    for value in arguments:
        if isinstance(value, Tensor):
            return value.device
        if isinstance(value, (torch.device, str)):
            return torch.device(value)
    return None


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, (list, tuple)) and any(map(_holds_tensors, value)))
