"""How a kernel is launched; or noted instead of launched, so that it can be compiled before its first launch.

Every launch of this room goes through :func:`launch`, so that one which is noted has the arguments, constants and
options of the later one. While launches are noted, tensors may be fake.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisedit_compiler.kernels.addresses import ALIGNMENT, misalignment

DIVISOR = ALIGNMENT
"""Triton compiles whole numbers and addresses that this divides apart from others."""


@dataclass(frozen=True)
class Pointer:
    """Stands for a tensor where a kernel is compiled; Triton takes anything with these two members for one.

    Attributes:
        dtype: of the tensor.
        address: any that ``DIVISOR`` divides or not, as it does that of the tensor's first element.
    """

    dtype: torch.dtype
    address: int

    @classmethod
    def of(cls, tensor: Tensor) -> Pointer:
        return cls(tensor.dtype, misalignment(tensor))

    def data_ptr(self) -> int:
        return self.address


@dataclass(frozen=True)
class Launch:
    """A launch that was noted.

    Attributes:
        kernel: the function that Triton compiles.
        arguments: given by position, a :class:`Pointer` in place of every tensor; none of them is a constant.
        options: given by name: constants of the kernel, and warps and stages.
    """

    kernel: Any
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]

    @property
    def form(self) -> Hashable:
        """Equal for launches that run the same code."""
        kernel = self.kernel
        described = [
            _form(value, name in kernel.do_not_specialize, name in kernel.do_not_specialize_on_alignment)
            for name, value in zip(kernel.arg_names, self.arguments, strict=False)
        ]
        return kernel, tuple(described), tuple(sorted(self.options.items()))

    def warm_up(self) -> Any:
        """What the launch will run, from now on known to the kernel; compiled, unless it is known or on disk."""
        return self.kernel.warmup(*self.arguments, grid=(1,), **self.options)


_note: ContextVar[Callable[[Launch], None] | None] = ContextVar("fisedit_note_launches", default=None)


@contextmanager
def noting(note: Callable[[Launch], None]) -> Iterator[None]:
    """Inside the block this thread launches no kernel; ``note`` is told of those it would launch."""
    token = _note.set(note)
    try:
        yield
    finally:
        _note.reset(token)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a kernel: arguments by position, constants and options by name."""
    note = _note.get()
    if note is None:
        kernel[grid](*arguments, **options)
    else:
        given = tuple(Pointer.of(value) if isinstance(value, Tensor) else value for value in arguments)
        note(Launch(kernel, given, options))


def _form(value: Any, any_value: bool, any_address: bool) -> Hashable:
    """What of an argument Triton compiles for, unless a kernel is meant for any value or any address."""
    if isinstance(value, Pointer):
        return value.dtype, any_address or value.address % DIVISOR == 0
    if isinstance(value, int):
        wide = not -(2**31) <= value < 2**31
        return int, wide, not any_value and value == 1, not any_value and value % DIVISOR == 0
    return type(value).__name__
