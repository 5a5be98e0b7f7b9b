"""What no attribute of an object tells: how far an iterator or a source of random numbers is, and which one it is."""

from __future__ import annotations

import random
import types
import warnings
import weakref
from collections.abc import Sized
from itertools import count
from typing import Any

import numpy as np

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_MAX_DEPTH = 6


_numbers = count()
_numbered: dict[int, tuple[Any, int]] = {}


def serial_number(value: Any) -> int:
    """A number that no other object of this process has or will have, unlike ``id``."""
    known = _numbered.get(id(value))
    if known is None:
        number = id(value)
        try:
            held: Any = weakref.ref(value, lambda _: _numbered.pop(number, None))
        except TypeError:
            held = value  # lives on, so that its place in memory stays its own
        known = _numbered[number] = (held, next(_numbers))
    return known[1]


def state_of(value: Any) -> str | None:
    """The state as a text that differs after the next draw; ``None`` if this is no such thing, or does not tell.

    Iterators of a user's own classes have attributes, which are read as such.
    """
    if isinstance(value, random.Random):
        return str(hash(value.getstate()))
    if isinstance(value, np.random.RandomState):
        return str(value.get_state(legacy=False))
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    return _position(value, _MAX_DEPTH) if hasattr(type(value), "__next__") else None


def _position(value: Any, depth: int) -> str | None:
    if isinstance(value, types.GeneratorType):
        frame = value.gi_frame
        if frame is None:
            return "at its end"
        return f"{frame.f_lasti} {_told({name: held for name, held in frame.f_locals.items()}, depth - 1)}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of iterators that Python stops to pickle
            return _told(value.__reduce__()[1:], depth - 1)
    except Exception:  # Python 3.14 does not pickle the iterators of itertools any more, and shows some of them
        return text if "object at" not in (text := repr(value)) else None


def _told(value: Any, depth: int) -> str:
    """Numbers, texts and positions in a value; of containers, their sizes."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if depth > 0 and isinstance(value, tuple):
        return f"({', '.join(_told(item, depth - 1) for item in value)})"
    if depth > 0 and isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {_told(item, depth - 1)}' for key, item in value.items())}}}"
    if depth > 0 and hasattr(type(value), "__next__"):
        return f"<{_position(value, depth)}>"
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, Sized) else type(value).__name__
