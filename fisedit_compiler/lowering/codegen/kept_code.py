"""What Inductor keeps on disk of a step, and how a later process finds it again.

Inductor looks for code by the graph that it gets, by torch and by its settings. What this package has it compile in an
op's place is none of these, so a digest of it is put with them: code of another version of the package is not found,
nor that of operations of other packages that meant something else.
From torch 2.13 on all decompositions are a part of what is looked for, and cannot be: many have no name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import nn

from fisedit_compiler.capture.keys.code import home
from fisedit_compiler.capture.keys.structure import structure_key
from fisedit_compiler.kernels.traits import inlined

_ROOMS = ("kernels", "geometry", "lowering")
"""Where it is written what ops are taken apart into, and what Inductor is told to choose."""


@contextmanager
def by_digest() -> Iterator[None]:
    """Inside the block Inductor finds code of this version of the package only."""
    config: Any = torch.compiler.config
    with config.patch(cache_key_tag=f"{config.cache_key_tag}fisedit {digest()}"):
        yield


def by_name(options: dict[str, Any], decompositions: Callable[[], Any]) -> dict[str, Any]:
    """Options of a compilation in which a function that has a name gives the decompositions, if any does."""
    return {**options, "get_decomp_fn": decompositions} if "get_decomp_fn" in options else options


def digest() -> str:
    """Of what Inductor compiles in place of ops, and how: the sources of this package, functions of others."""
    others = [inline for inline in inlined().values() if not _is_of_this_package(inline)]
    return _of_this_package() + (_of_functions(others) if others else "")


def is_in_digest(function: Any) -> bool:
    """Whether the digest tells what a function does: it was written in one of these rooms, and is bound to nothing."""
    if not isinstance(function, FunctionType) or function.__closure__:
        return False
    package, _, rest = home(function).partition(".")
    return package == __package__.partition(".")[0] and rest.partition(".")[0] in _ROOMS


def _is_of_this_package(function: Callable[..., Any]) -> bool:
    return isinstance(function, FunctionType) and home(function).startswith(f"{__package__.partition('.')[0]}.")


@cache
def _of_this_package() -> str:
    found = hashlib.sha256()
    package = Path(__file__).parents[2]
    for file in sorted(file for room in _ROOMS for file in (package / room).rglob("*.py")):
        found.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def _of_functions(functions: list[Callable[..., Any]]) -> str:
    """What they do, with all that they read; a text of this process only where that cannot be told."""
    holder = nn.Module()
    holder.functions = functions  # type: ignore[assignment]
    return structure_key(holder)[:16]
