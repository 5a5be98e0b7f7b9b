"""What a forward reads that hangs on no module: torch's own functions, hooks of all modules, state of packages.

A package is known by its version (``code.py``) only as long as nobody puts something in the place of a part of it.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch.library import CustomOpDef

from fisedit_compiler.capture.keys.code import home, is_installed

# Where torch's own functions, and those it only passes on, say that they are from.
_TORCH_AND_PYTHON = frozenset({"torch", "typing_extensions", *sys.stdlib_module_names})
# What no forward computes with: another compiler or loader makes no other model.
_NOT_COMPUTED = frozenset({"compile", "load", "save"})
# Parts of packages that load models and tell users things, with states of their own.
_NOT_MODELS = frozenset(
    {"utils", "loaders", "hooks", "pipelines", "quantizers", "modeling_utils", "configuration_utils"}
)


class Place(NamedTuple):
    """A namespace by name, to be watched, and what was found there that its package's version does not say."""

    name: str
    values: Mapping[str, Any]
    found: list[tuple[Any, Any]]


def of_torch() -> Iterator[Place]:
    """Functions of torch that somebody replaced, and hooks that run around every module's forward."""
    for library in (torch, torch.nn.functional, torch.Tensor, torch.special, torch.linalg, torch.fft):
        values = vars(library)
        names = [name for name in sorted(values) if name not in _NOT_COMPUTED and _is_replaced(values[name])]
        yield Place(library.__name__, values, [(name, values[name]) for name in names])
    for name in ("_global_forward_pre_hooks", "_global_forward_hooks"):
        hooks = getattr(torch.nn.modules.module, name)
        yield Place(name, hooks, list(hooks.items()))


def of_package(module_name: str, seen: set[str]) -> Iterator[Place]:
    """State of one module of an installed package, and of those whose functions and classes it names.

    Functions and methods that somebody replaced, and switches: names in capitals, and what classes hold.

    Args:
        module_name: such as ``diffusers.models.attention_processor``.
        seen: modules not to look at again; grows.
    """
    root = _root(module_name)
    module = sys.modules.get(module_name)
    if module_name in seen or root in _TORCH_AND_PYTHON or root == _root(__name__) or not is_installed(module_name):
        return
    if type(module) is not types.ModuleType:  # one that fills itself as it is used
        return
    seen.add(module_name)
    if not _NOT_MODELS.isdisjoint(module_name.split(".")):
        return
    found: list[tuple[str, Any]] = []
    others: dict[str, None] = {}
    for name, member in sorted(vars(module).items()):
        if name.startswith("__"):
            continue
        own = home(member) if isinstance(member, types.FunctionType) else getattr(member, "__module__", module_name)
        origin = str(own)
        if _is_function(member) and _root(origin) != root:
            # A package has functions of others; which, its version says, unless it is the user's.
            found.append((name, origin if is_installed(origin) else member))
        elif _is_switch(member) and name.lstrip("_").isupper():
            found.append((name, member))
        elif isinstance(member, type) and origin == module_name:
            yield from _of_class(member)
        elif isinstance(member, types.FunctionType) or (
            isinstance(member, type) and issubclass(member, torch.nn.Module)
        ):
            others[origin] = None
    yield Place(module_name, vars(module), found)
    for other in others:
        yield from of_package(other, seen)


def _of_class(value: type) -> Iterator[Place]:
    """What a class holds for all its instances."""
    if issubclass(value, Enum) or dataclasses.is_dataclass(value):
        return
    switches = sorted(name for name, held in vars(value).items() if _is_switch(held))
    if switches:
        name = f"{value.__module__}.{value.__qualname__}"
        yield Place(name, vars(value), [(switch, vars(value)[switch]) for switch in switches])


def _is_switch(value: Any) -> bool:
    return isinstance(value, Enum) or type(value) in (bool, int, float)


def _is_function(value: Any) -> bool:
    return isinstance(value, functools.partial) or (callable(value) and not isinstance(value, type))


def _is_replaced(value: Any) -> bool:
    """Whether what torch has as a function is from elsewhere."""
    while isinstance(value, (functools.partial, functools._lru_cache_wrapper)):
        value = value.func if isinstance(value, functools.partial) else value.__wrapped__
    if isinstance(value, types.FunctionType):
        return _root(home(value)) not in _TORCH_AND_PYTHON
    if not _is_function(value):
        return False
    if _root(type(value).__module__) not in _TORCH_AND_PYTHON:
        return True
    return isinstance(value, CustomOpDef) or _root(getattr(value, "__module__", None)) not in _TORCH_AND_PYTHON


def _root(module_name: Any) -> str:
    return str(module_name or "torch").partition(".")[0]
