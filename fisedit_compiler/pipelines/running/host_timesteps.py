"""Timesteps where a scheduler reads them: on the host, beside those on the device that the models get.

A pipeline of diffusers goes through ``scheduler.timesteps``, which are on the device, and hands each one to the models
and to the scheduler. The models compute with it. The scheduler looks coefficients up by it, in tables on the host, and
so reads it back, about five times a step; the host waits for everything launched so far, and the device then waits for
the host. Here the scheduler's own methods get the same number from a copy on the host. It is recognised by where it is
in the device's memory, so nothing is read. Everybody else sees the timesteps where they were.

Coefficients are the same bit for bit, because the schedulers that are served compute nothing with a timestep but
indices into tables. The one that does (LCM) computes that with the device's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from fisedit_compiler.tensors.contents import version

LOOKING_UP = frozenset(
    f"{name}Scheduler"
    for name in (
        "DDIM",
        "DDPM",
        "DEISMultistep",
        "DPMSolverMultistep",
        "DPMSolverSDE",
        "DPMSolverSinglestep",
        "EDMDPMSolverMultistep",
        "EDMEuler",
        "EulerAncestralDiscrete",
        "EulerDiscrete",
        "HeunDiscrete",
        "IPNDM",
        "KDPM2AncestralDiscrete",
        "KDPM2Discrete",
        "LCM",
        "LMSDiscrete",
        "PNDM",
        "SASolver",
        "TCD",
        "UniPCMultistep",
    )
)
"""Classes of diffusers whose steps use a timestep as an index only, or as an argument of one of ``_COMPUTING``."""
_READING = ("step", "scale_model_input")
_COMPUTING = ("get_scalings_for_boundary_condition_discrete",)
"""Methods that compute with a timestep: what comes of it depends on where that is done."""


def read_on_host(scheduler: Any) -> Any:
    """Let a scheduler of one run look its coefficients up without waiting for the device; returns it.

    A class that is not known to use timesteps as indices only, such as one of the user's own, stays as it is.
    """
    if is_known(type(scheduler)):
        _HostTimesteps(scheduler)
    return scheduler


def is_known(kind: type) -> bool:
    """Whether a class is one of diffusers whose steps were read."""
    return kind.__name__ in LOOKING_UP and kind.__module__.startswith("diffusers.schedulers.")


class _HostTimesteps:
    """The timesteps of one scheduler on the device and on the host."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._device: Tensor | None = None
        self._host: Tensor | None = None
        self._version = 0
        self._exchange("set_timesteps", self._noting)
        for name in _READING:
            self._exchange(name, self._reading)
        for name in _COMPUTING:
            self._exchange(name, self._computing)

    def _exchange(self, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        method = getattr(self._scheduler, name, None)
        if method is not None:
            # Pipelines look at the arguments of some methods, which `wraps` keeps.
            setattr(self._scheduler, name, functools.wraps(method)(around(method)))

    def _noting(self, set_timesteps: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            result = set_timesteps(*args, **kwargs)
            timesteps = self._scheduler.timesteps
            self._device = self._host = None
            if isinstance(timesteps, Tensor) and is_away(timesteps) and timesteps.is_contiguous():
                self._device, self._version = timesteps, version(timesteps)
                self._host = timesteps.to("cpu", copy=True)  # the one wait of a run
            return result

        return noted

    def _reading(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def read(*args: Any, **kwargs: Any) -> Any:
            on_host = [self._twin(value, self._device, self._host) for value in args]
            named = {name: self._twin(value, self._device, self._host) for name, value in kwargs.items()}
            known = [*on_host, *named.values()]
            if all(twin is value for twin, value in zip(known, (*args, *kwargs.values()), strict=True)):
                return method(*args, **kwargs)
            with self._on_host():
                return method(*on_host, **named)

        return read

    def _computing(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def compute(*args: Any) -> Any:
            return method(*(self._twin(value, self._host, self._device) for value in args))

        return compute

    @contextmanager
    def _on_host(self) -> Iterator[None]:
        """Inside the block the scheduler's own timesteps are those on the host."""
        scheduler = self._scheduler
        scheduler.timesteps = self._host
        try:
            yield
        finally:
            if scheduler.timesteps is self._host:
                scheduler.timesteps = self._device

    def _twin(self, value: Any, here: Tensor | None, there: Tensor | None) -> Any:
        """What is in the place of a timestep on the other side; anything else as it is."""
        if here is None or there is None or not isinstance(value, Tensor) or value.dtype != here.dtype:
            return value
        if value.dim() or value.device != here.device or version(here) != self._version_of(here):
            return value
        place, rest = divmod(value.data_ptr() - here.data_ptr(), here.element_size())
        return there[place] if not rest and 0 <= place < here.numel() else value

    def _version_of(self, here: Tensor) -> int:
        return self._version if here is self._device else version(here)


def is_away(value: Tensor) -> bool:
    """Whether reading a tensor makes the host wait."""
    return value.is_cuda
