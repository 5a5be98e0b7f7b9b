"""One compilation at a time in a process.

``torch.export`` is not thread-safe: two at once corrupt its stack of modes ("Trying to pop empty mode stack"). So
whatever captures, rewrites or lowers takes one lock: of two first uses in two threads one compiles and the other waits,
then finds the result if it is the same.

What is made already is looked up without the lock, so calls of compiled modules never wait.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, MutableMapping
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
K = TypeVar("K")
V = TypeVar("V")

COMPILING = threading.RLock()
"""Held by whoever compiles; re-entrant, as compiling one thing makes others."""


def one_at_a_time(function: Callable[P, V]) -> Callable[P, V]:
    """Run a function under :data:`COMPILING`."""

    @wraps(function)
    def locked(*args: P.args, **kwargs: P.kwargs) -> V:
        with COMPILING:
            return function(*args, **kwargs)

    return locked


def made_once(known: MutableMapping[K, V], key: K, make: Callable[[], V]) -> V:
    """What is known under a key; made first, by one thread while others wait, if nothing is."""
    found = known.get(key)
    if found is None:
        with COMPILING:
            found = known.get(key)
            if found is None:
                found = known[key] = make()
    return found
