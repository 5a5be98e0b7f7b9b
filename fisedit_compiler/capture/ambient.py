"""Ambient state: what changes the result of a call and stands neither in the module nor in the arguments.

A program is captured under the caller's autocast, default dtype and default device, and keyed by them; its casts are
nodes of its graph, so it runs with autocast off and outside inference mode, where every tensor that is kept can be
written again later. The user's own module runs under exactly what the caller has set. What cannot be followed (function
transforms, fake tensors, gradients, modes that see every operation) is refused before anything runs.

``docs/ambient.md`` lists every case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from fisedit_compiler.errors import ModeError

_DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps")
_REMEDY = "Leave it around record() and edit(), or call the module itself (`compiled.original`) under it."


@dataclass(frozen=True)
class Ambient:
    """The state a call is made in; equal ones share a program.

    Attributes:
        autocast: device type and dtype of every autocast that is on.
        default_dtype: of floating tensors that a forward makes without naming one.
        default_device: where a forward makes tensors without naming a device.
        deterministic: whether deterministic algorithms are asked for.
        inference: whether the caller is in inference mode, which changes no value.
    """

    autocast: tuple[tuple[str, torch.dtype], ...] = ()
    default_dtype: torch.dtype = torch.float32
    default_device: str = "cpu"
    deterministic: bool = False
    inference: bool = field(default=False, compare=False, repr=False)

    @classmethod
    def now(cls) -> Ambient:
        """What the calling thread has set. A few microseconds: states that were seen before are kept."""
        seen = (
            *map(torch.is_autocast_enabled, _DEVICE_TYPES),
            *map(torch.get_autocast_dtype, _DEVICE_TYPES),
            torch.get_default_dtype(),
            # Without a mode on torch's functions nobody has set a default device.
            torch.get_default_device() if torch._C._len_torch_function_stack() else None,
            torch.are_deterministic_algorithms_enabled(),
            torch.is_inference_mode_enabled(),
        )
        state = _SEEN.get(seen)
        if state is None:
            if len(_SEEN) >= _MAX_SEEN:
                _SEEN.clear()
            state = _SEEN[seen] = cls(
                tuple(
                    (kind, torch.get_autocast_dtype(kind)) for kind in _DEVICE_TYPES if torch.is_autocast_enabled(kind)
                ),
                torch.get_default_dtype(),
                str(torch.get_default_device()),
                torch.are_deterministic_algorithms_enabled(),
                torch.is_inference_mode_enabled(),
            )
        return state

    def neutral(self) -> AbstractContextManager[Any]:
        """The state that programs run in: autocast off, outside inference mode."""
        if not self.autocast and not self.inference:
            return nullcontext()
        return self._contexts(autocast=False, inference=False)

    def capturing(self) -> AbstractContextManager[Any]:
        """The state that a module is captured in, entered from :meth:`neutral`."""
        return self._contexts(autocast=True, inference=False) if self.autocast else nullcontext()

    def around(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """``run`` in the caller's own state, called from :meth:`neutral`."""
        if not self.autocast and not self.inference:
            return run

        def as_the_caller(*args: Any, **kwargs: Any) -> Any:
            with self._contexts(autocast=True, inference=self.inference):
                return run(*args, **kwargs)

        return as_the_caller

    @contextmanager
    def _contexts(self, *, autocast: bool, inference: bool) -> Iterator[None]:
        with ExitStack() as stack:
            # Entering or leaving inference mode sets the grad mode, too; every call is made without gradients.
            stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.no_grad())
            for kind, dtype in self.autocast:
                # Casts are not cached: a capture would leave fake ones behind.
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=autocast, cache_enabled=False))
            yield

    def describe(self) -> str:
        """The parts that decide about values, in words."""
        casts = " and ".join(f"torch.autocast({kind!r}, {dtype})" for kind, dtype in self.autocast)
        return f"{casts or 'no autocast'}, default dtype {self.default_dtype}"

    def fits(self, recorded: Ambient) -> bool:
        """Whether a call may edit one that was recorded in another state: whether both compute with the same dtypes."""
        return (self.autocast, self.default_dtype) == (recorded.autocast, recorded.default_dtype)


_SEEN: dict[tuple[Any, ...], Ambient] = {}
_MAX_SEEN = 64

PLAIN = Ambient()
"""The state of a process that has set nothing."""


def refuse_foreign_modes() -> None:
    """Refuse what would see, change or trace the operations of a program.

    Raises:
        ModeError: a function transform, forward-mode differentiation or a mode on torch's functions is active.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise ModeError(f"A call inside torch.func (vmap, grad, jvp, functionalize) cannot be recorded. {_REMEDY}")
    if forward_ad._current_level >= 0:
        raise ModeError(f"A call inside forward-mode differentiation has no tangents when it is recorded. {_REMEDY}")
    if torch._C._len_torch_dispatch_stack():
        names = ", ".join(type(mode).__name__ for mode in _get_current_dispatch_mode_stack())
        raise ModeError(
            f"{names} is active. A recording needs values, and compiled steps do not show a mode all their operations. "
            f"{_REMEDY}"
        )
    if torch._C._len_torch_function_stack():
        modes = [mode for mode in _get_current_function_mode_stack() if not isinstance(mode, DeviceContext)]
        if modes:
            names = ", ".join(type(mode).__name__ for mode in modes)
            raise ModeError(f"{names} is active, which a program compiled without it would not follow. {_REMEDY}")


def refuse_arguments(args: Any, kwargs: Any) -> None:
    """Refuse tensors whose results a program cannot give.

    Raises:
        ModeError: a tensor is fake, or wants gradients while they are enabled.
    """
    grad = torch.is_grad_enabled()
    for value in _tensors((args, kwargs)):
        if isinstance(value, FakeTensor):
            raise ModeError("An argument is a FakeTensor, which has no values to record or edit. Pass a real one.")
        if grad and value.requires_grad:
            raise ModeError(
                "An argument requires gradients, but calls inside record() and edit() have none. Wrap the run in "
                "torch.no_grad(), or detach() the argument; for gradients call the module outside of both modes."
            )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
