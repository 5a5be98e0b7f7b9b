"""Whether a forward depends on what its earlier calls left behind.

A forward may note a shape, keep a count, fill a list or cache what depends on shapes alone. A recording cannot be
repeated if it also goes by such a note: a processor that acts from its tenth call on, a layer that keeps what it
computed for other inputs. One call more with the same inputs does not show that, so three things are tried:

1. a call with other inputs comes in between, from the state before the first;
2. what changes at every call is exchanged for a stand-in that tells when it is looked at;
3. lists and arrays that grow or change at every call are made much larger.

What a text made of a number is used for is not seen.
"""

from __future__ import annotations

import operator
from array import array
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping, MutableSequence, MutableSet
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisedit_compiler.capture.keys.notes import Change, Drawn, Rewritten, describe
from fisedit_compiler.capture.keys.snapshot import Snapshot

_MANY = 1000
_MISSING = object()


def dependence(
    start: Snapshot,
    own: list[Any],
    run: Callable[[], list[Any]],
    run_other: Callable[[], object],
    difference: Callable[[list[Any], list[Any]], str],
) -> str:
    """How a forward depends on what its earlier calls wrote, in words; empty if it does not seem to.

    The caller puts back what these calls wrote.

    Args:
        start: what was there before the first call.
        own: outputs of the first call.
        run: makes the call again.
        run_other: makes a call with other inputs of the same shapes.
        difference: what differs between two lists of outputs, in words.
    """
    start.restore(everything=True)
    try:
        run_other()
    except Exception:  # a module that takes no other inputs: the second call then is like the first
        start.restore(everything=True)
    before = Snapshot(start.module)
    again = run()
    changes = [change for change in before.changes() if not _is_settled(change)]
    if drawn := sorted({change.place.strip(". ") for change in changes if isinstance(change, Drawn)}):
        return f"it draws from {', '.join(drawn)}"
    if problem := difference(own, again):
        return problem
    looked: list[str] = []
    with _stand_ins(changes, looked) as placed:
        problem = _fails(run, own, difference) if placed else ""
    if looked or problem:
        return f"it looks at {', '.join(sorted(set(looked or placed)))}"
    with _enlarged(changes) as placed:
        problem = _fails(run, own, difference) if placed else ""
    return f"{problem} after {', '.join(placed)} had grown" if problem else ""


def _fails(run: Callable[[], list[Any]], own: list[Any], difference: Callable[[list[Any], list[Any]], str]) -> str:
    try:
        return difference(own, run())
    except Exception as error:
        return type(error).__name__


def _is_settled(change: Change | Rewritten | Drawn) -> bool:
    """Whether another call wrote what was there already."""
    if isinstance(change, Drawn):
        return _same(change.before, change.now)
    return isinstance(change, Change) and all(
        _same(change.before.get(key, _MISSING), change.now.get(key, _MISSING)) for key in change.written()
    )


def _same(before: Any, now: Any) -> bool:
    if before is now:
        return True
    if type(before) is not type(now):
        return False
    if isinstance(before, Tensor):
        return before.shape == now.shape and before.dtype == now.dtype and bool(torch.equal(before, now))
    if isinstance(before, np.ndarray):
        return np.array_equal(before, now)
    if isinstance(before, (list, tuple)):
        return len(before) == len(now) and all(map(_same, before, now))
    if isinstance(before, dict):
        return before.keys() == now.keys() and all(_same(before[key], now[key]) for key in before)
    return isinstance(before, (bool, int, float, complex, str, bytes, set, frozenset, torch.dtype)) and before == now


# -- stand-ins for single values ----------------------------------------------------------------------


@contextmanager
def _stand_ins(changes: list[Change | Rewritten | Drawn], looked: list[str]) -> Iterator[list[str]]:
    """Put a stand-in in the place of every value that was exchanged; yields the places."""
    exchanged = [
        (change, key)
        for change in changes
        if isinstance(change, Change)
        for key in change.written()
        if key in change.before and key in change.now
    ]
    for change, key in exchanged:
        place = describe((change.place, key))
        change.put(key, _stand_in(change.now[key], lambda place=place: looked.append(place)))  # type: ignore[misc]
    yield [describe((change.place, key)) for change, key in exchanged]


def _stand_in(value: Any, tell: Callable[[], None]) -> Any:
    return (_Number if isinstance(value, (bool, int, float)) else _Opaque)(value, tell)


class _Opaque:
    """Stands for a value: whatever is done with it is told, and done."""

    def __init__(self, value: Any, tell: Callable[[], None]) -> None:
        self._value, self._tell = value, tell

    __class__ = property(lambda self: type(self._value))  # type: ignore[assignment] # for isinstance()

    def __getattr__(self, name: str) -> Any:
        self._tell()
        return getattr(self._value, name)

    def __repr__(self) -> str:
        return repr(self._value)

    def __str__(self) -> str:
        return str(self._value)

    def __format__(self, form: str) -> str:
        return format(self._value, form)


class _Number(_Opaque):
    """Stands for a number: counting on makes another stand-in, everything else is told, and done."""


def _plain(value: Any) -> Any:
    return value._value if issubclass(type(value), _Opaque) else value


_BUILT_IN: dict[str, Callable[..., Any]] = {
    "__bool__": bool, "__complex__": complex, "__float__": float, "__hash__": hash, "__int__": int, "__iter__": iter,
    "__len__": len, "__reversed__": reversed, "__round__": round,
}  # fmt: skip


def _told(name: str) -> Callable[..., Any]:
    compute = _BUILT_IN.get(name) or getattr(operator, name)

    def method(self: _Opaque, *arguments: Any) -> Any:
        self._tell()
        return compute(self._value, *map(_plain, arguments))

    return method


def _counted(name: str, swapped: bool) -> Callable[..., Any]:
    compute = getattr(operator, name)

    def method(self: _Number, *arguments: Any) -> Any:
        values = [self._value, *map(_plain, arguments)]
        result = compute(*reversed(values)) if swapped else compute(*values)
        if isinstance(result, (bool, int, float)):
            return _Number(result, self._tell)
        self._tell()  # a tensor was scaled by it
        return result

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"):
    setattr(_Number, f"__{_name}__", _counted(f"__{_name}__", swapped=False))
    setattr(_Number, f"__r{_name}__", _counted(f"__{_name}__", swapped=True))
for _name in ("neg", "pos", "abs", "invert"):
    setattr(_Number, f"__{_name}__", _counted(f"__{_name}__", swapped=False))
for _name in (
    "lt", "le", "gt", "ge", "eq", "ne", "bool", "int", "float", "complex", "index", "hash", "round", "len", "iter",
    "getitem", "setitem", "delitem", "contains", "reversed", "call",
):  # fmt: skip
    setattr(_Opaque, f"__{_name}__", _told(f"__{_name}__"))
for _name in ("add", "sub", "mul", "truediv", "matmul", "and", "or"):
    setattr(_Opaque, f"__{_name}__", _told(f"__{_name}__"))


# -- what grows or is written in place ----------------------------------------------------------------


@contextmanager
def _enlarged(changes: list[Change | Rewritten | Drawn]) -> Iterator[list[str]]:
    """Make much more of what grew, and much larger numbers of those written in place; yields the places."""
    places, undo = [], []
    for change in changes:
        if isinstance(change, Drawn):
            continue
        if isinstance(change, Rewritten):
            undo.append(_with_large_numbers(change.live))
        elif change.now.keys() - change.before.keys() and _grow(change.live):
            pass
        else:
            continue
        places.append(change.place.strip(". "))
    try:
        yield places
    finally:
        for put_back in undo:
            put_back()


def _grow(live: Any) -> bool:
    if isinstance(live, (MutableSequence, deque)):
        live.extend(list(live)[-1:] * _MANY)
    elif isinstance(live, MutableSet):
        for number in range(_MANY):
            live.add(f"another {number}")
    elif isinstance(live, MutableMapping) and live:
        last = list(live.values())[-1]
        live.update({f"another {number}": last for number in range(_MANY)})
    else:
        return False
    return True


def _with_large_numbers(live: Any) -> Callable[[], None]:
    """Write large numbers to memory; returns what undoes it."""
    if isinstance(live, Tensor):
        kept = live.detach().clone()
        with torch.no_grad():
            live.fill_(1 if live.dtype is torch.bool else 100)
        return lambda: live.detach().copy_(kept)  # type: ignore[return-value]
    saved = live.copy() if isinstance(live, np.ndarray) else live[:]
    if isinstance(live, np.ndarray):
        live.fill(1 if live.dtype == bool else 100)
    elif isinstance(live, (bytearray, array)):
        for index in range(len(live)):
            live[index] = 100

    def put_back() -> None:
        live[:] = saved

    return put_back
