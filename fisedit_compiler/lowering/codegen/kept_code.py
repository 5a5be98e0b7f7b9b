"""What Inductor keeps on disk of a step, and how a later process finds it again.

Inductor looks for code by the graph that it gets, by torch and by its settings. What this package has it compile in an
op's place is none of these, so a digest of it is put with them: code of another version of the package is not found.
From torch 2.13 on all decompositions are a part of what is looked for, and cannot be: many have no name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

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


@cache
def digest() -> str:
    """Of the sources that say what Inductor compiles in place of ops, and how."""
    found = hashlib.sha256()
    package = Path(__file__).parents[2]
    for file in sorted(file for room in _ROOMS for file in (package / room).rglob("*.py")):
        found.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return found.hexdigest()[:16]
