"""The scheduler of one run: a copy of the pipeline's, whose noise is the same in every run.

A base and its edits must walk the same path, and some schedulers keep something of the last run. So every run gets a
copy of what the user configured, and the user's own object stays as it is: afterwards, where a copy cannot be made.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import numpy as np
import torch

from fisedit_compiler.errors import ConfigError
from fisedit_compiler.pipelines.running.copies import LOOKED_AT, CopiesBehind
from fisedit_compiler.pipelines.running.host_timesteps import is_known, read_on_host


@contextmanager
def scheduler_of_a_run(pipe: Any, seed: int, copies: int = 1, own: Any = None) -> Iterator[None]:
    """Gives ``pipe`` a scheduler for one run, and its own back afterwards.

    Args:
        pipe: the pipeline.
        seed: of what a scheduler draws without the run's generator.
        copies: pictures the run makes; each gets the noise that one alone would get.
        own: a scheduler of the caller's, used as it is.
    """
    given, held = pipe.scheduler, None
    if own is None:
        if _has_functions_of_its_own(given):
            own, held = given, {name: _copied_container(value) for name, value in vars(given).items()}
        else:
            own = _copied(given)
        own = _seeded(own, seed, copies)
        always = not _is_as_read(own)
        own = _watched(read_on_host(own), always=always)
    pipe.scheduler = own
    try:
        yield
    finally:
        pipe.scheduler = given
        if held is not None:
            vars(given).clear()
            vars(given).update(held)


def _has_functions_of_its_own(scheduler: Any) -> bool:
    """Whether somebody put a function in the place of a method: it may lead to this object, also from a copy."""
    return any(
        isinstance(value, types.FunctionType) and hasattr(type(scheduler), name)
        for name, value in vars(scheduler).items()
    )


def _copied_container(value: Any) -> Any:
    return copy.copy(value) if type(value) in (list, dict, deque) else value


def _copied(scheduler: Any) -> Any:
    try:
        return copy.deepcopy(scheduler)
    except Exception:
        # It holds a lock or an open file. Configurations are replaced, never written to: a shallow copy protects them.
        return copy.copy(scheduler)


def _seeded(scheduler: Any, seed: int, copies: int) -> Any:
    """Name the seed of a noise sampler that the scheduler would seed by chance (``DPMSolverSDEScheduler``)."""
    if "noise_sampler_seed" in scheduler.config:
        chosen = scheduler.config["noise_sampler_seed"]
        chosen = seed if chosen is None else chosen
        # A list is one sampler for each picture, all with the same noise.
        scheduler.noise_sampler_seed = [chosen] * copies if copies > 1 and isinstance(chosen, int) else chosen
    return scheduler


def _is_as_read(scheduler: Any) -> bool:
    """Whether its step is that of a class of diffusers whose steps were read: they draw no numbers of numpy."""
    kind = type(scheduler)
    step = kind.step  # wrapped, it calls itself what it wraps
    return is_known(kind) and "step" not in vars(scheduler) and step.__globals__.get("__name__") == kind.__module__


def _watched(scheduler: Any, *, always: bool) -> Any:
    """Refuse the first step that draws numbers which the run's generator does not decide; let none wait for a copy.

    Reading what numpy would draw next takes the host nearly as long as a step. Unless ``always``, it is read in the
    first steps only. Torch's generators are read in every step.
    """
    step: Callable[..., Any] = scheduler.step
    name, copies, steps = type(scheduler).__name__, CopiesBehind(), count()

    @functools.wraps(step)
    def watched(*args: Any, **kwargs: Any) -> Any:
        device = next((value.device for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
        of_numpy = always or next(steps) < LOOKED_AT
        before = _global_states(device, of_numpy=of_numpy)
        with copies.block(device):
            result = step(*args, **kwargs)
        if before != _global_states(device, of_numpy=of_numpy):
            raise ConfigError(
                f"{name}.step() drew random numbers of its own, not from the generator it is given, so no edit could "
                f"follow its base. {_remedy(type(scheduler).step, step)}. If another thread drew numbers at the same "
                "moment, run again"
            )
        return result

    scheduler.step = watched
    return scheduler


def _remedy(own: Callable[..., Any], used: Callable[..., Any]) -> str:
    """What helps if a step draws numbers: ``own`` is that of the scheduler's class, ``used`` may be another."""
    if "generator" in inspect.signature(own).parameters and "generator" not in inspect.signature(used).parameters:
        return (
            "Its step() was replaced by a function without an argument `generator`, so pipelines give it none: "
            "decorate the function with functools.wraps of the step, or give it that argument"
        )
    return "Use a scheduler whose step() draws from `generator`, or one that draws nothing (DDIM, DPM++, Euler)"


def _global_states(device: torch.device | None, *, of_numpy: bool) -> tuple[bytes, ...]:
    """What the generators of the process would draw next. Read on the host: a GPU is not waited for."""
    states = [torch.get_rng_state().numpy().tobytes()]
    if of_numpy:
        found: dict[str, Any] = dict(np.random.get_state(legacy=False))
        held = {**found, **found["state"]}.values()  # names depend on the kind of generator
        states += [value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode() for value in held]
    if device is not None and device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device).numpy().tobytes())
    return tuple(states)
