"""Where a run computes, found in a tenth of the time.

A diffusers pipeline asks all modules of its models, by attributes that none of them has, whether one is offloaded: some
2,000 of SD2.1, at the start of every run, while the device waits. In a run of the Editor they are asked in another way.
Where one is offloaded, or models lie on several devices, the pipeline is asked itself.
"""

from __future__ import annotations

import copyreg
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import nn

_NAME = "_execution_device"
_ASKED = (_NAME, "device", "components")
"""What finds it reads of a pipeline."""
_HOOKS = frozenset(("_diffusers_hook", "_hf_hook"))
"""Attributes of modules by which diffusers and accelerate move weights."""


@contextmanager
def device_looked_up(pipe: Any) -> Iterator[None]:
    """Inside the block, a pipeline finds its device quickly.

    It is of a subclass of its class meanwhile; copies of it, and what is pickled of it, are of its class itself.
    """
    own: type = getattr(type(pipe), "_fisedit_stock", type(pipe))
    if not _is_stock(own):
        yield
        return
    quick = _quick(own)
    pipe.__class__ = quick
    try:
        yield
    finally:
        if type(pipe) is quick:  # else somebody has given it another one
            pipe.__class__ = own


def device_of_run(pipe: Any) -> torch.device | None:
    """Where the models of a pipeline are; ``None`` if that has to be asked of the pipeline itself."""
    models = [model for model in pipe.components.values() if isinstance(model, nn.Module)]
    if not models or any(map(_is_hooked, models)):
        return None
    first = [next(chain(model.parameters(), model.buffers()), None) for model in models]
    devices = {None if value is None else value.device for value in first}
    return devices.pop() if len(devices) == 1 else None


def _is_hooked(model: nn.Module) -> bool:
    waiting = [model]
    while waiting:
        attributes = vars(waiting.pop())
        if not _HOOKS.isdisjoint(attributes):
            return True
        waiting += [part for part in attributes["_modules"].values() if part is not None]
    return False


def _is_stock(kind: type) -> bool:
    """Whether a pipeline's class finds its device as all of diffusers' do, and nothing happens where one is derived."""
    from diffusers import DiffusionPipeline

    if not issubclass(kind, DiffusionPipeline):
        return False
    if any(getattr(kind, name) is not getattr(DiffusionPipeline, name) for name in _ASKED):
        return False
    return type(kind) is type and not any("__init_subclass__" in vars(base) for base in kind.__mro__[:-1])


@cache
def _quick(own: type) -> type:
    stock = getattr(own, _NAME)
    stock_reduced: Any = own.__reduce_ex__

    def find(pipe: Any) -> Any:
        return device_of_run(pipe) or stock.fget(pipe)

    def reduced(pipe: Any, protocol: Any) -> Any:
        made = stock_reduced(pipe, protocol)
        if isinstance(made, str):
            return made
        function, arguments, *rest = made
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]
            function = own.__new__  # the other one is for an object's own class
        return function, tuple(own if value is quick else value for value in arguments), *rest

    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    given = {"_fisedit_stock": own, _NAME: property(find), "__reduce_ex__": reduced}
    quick = type(own.__name__, (own,), {**names, **given})
    return quick
