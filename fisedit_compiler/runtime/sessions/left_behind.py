"""Whether a forward depends on what its earlier calls left behind.

A forward may note a shape, keep a count, fill a list or cache what depends on shapes alone. One call more with the same
inputs does not show whether it goes by that, so a call with other inputs comes in between, from the state before the
first. Outputs that differ then are a dependence. What is left behind is of two kinds:

- *settled*: the next call leaves the same. A stand-in tells whether the forward looks at it. If so, it decides what the
  module computes, whoever writes it next; if not, it is only a note.
- *unsettled*: every call leaves something else, such as a count. Nobody can tell what that will lead to, so every
  recorded call has to be compared with the module's own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, MutableSet
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fisedit_compiler.capture.keys.notes import Change, Drawn, Note, Reordered, Rewritten
from fisedit_compiler.capture.keys.snapshot import Snapshot

_ALONE = 16
"""Places that are tried one by one, where all at once are an error."""
_MISSING = object()

Written = Change | Reordered | Rewritten | Drawn


class LeftBehind(NamedTuple):
    """What a forward leaves behind.

    Attributes:
        problem: how it depends on what its earlier calls wrote, in words; empty if it does not seem to.
        unsettled: what is another after every call.
        looked_at: what stays the same and decides what the forward computes.
    """

    problem: str = ""
    unsettled: tuple[Written, ...] = ()
    looked_at: frozenset[Note] = frozenset()


def left_behind(
    start: Snapshot,
    own: list[Any],
    run: Callable[[], list[Any]],
    run_others: tuple[Callable[[], object], ...],
    difference: Callable[[list[Any], list[Any]], str],
) -> LeftBehind:
    """Find out what a forward does with what its earlier calls left behind.

    The caller puts back what these calls wrote.

    Args:
        start: what was there before the first call.
        own: outputs of the first call.
        run: makes the call again.
        run_others: each makes a call with other inputs of the same shapes; the first that is no error is taken.
        difference: what differs between two lists of outputs, in words.
    """
    for run_other in run_others:
        start.restore(everything=True)
        with suppress(Exception):  # a module that takes no such inputs: the second call then is like the first
            run_other()
            break
    else:
        start.restore(everything=True)
    before = Snapshot(start.module)
    again = run()
    unsettled = tuple(change for change in before.changes() if not _is_settled(change))
    if drawn := sorted({change.place.strip(". ") for change in unsettled if isinstance(change, Drawn)}):
        return LeftBehind(f"it draws from {', '.join(drawn)}", unsettled)
    if problem := difference(own, again):
        return LeftBehind(problem, unsettled)
    settled = _settled(start.changes(), unsettled)
    return LeftBehind("", unsettled, _looked_at(settled, start.module, lambda: difference(own, run())))


def _settled(changes: list[Written], unsettled: tuple[Written, ...]) -> list[tuple[Change, Any]]:
    """Places that hold since the first call what they hold now, for which a stand-in can be put."""
    moving = {(change.place, key) for change in unsettled if isinstance(change, Change) for key in change.written()}
    # What is in a list that grows is none of the list's settled parts.
    filled = {change.place for change in unsettled if isinstance(change, Change) and change.grows}
    return [
        (change, key)
        for change in changes
        if isinstance(change, Change) and not isinstance(change.live, MutableSet) and change.place not in filled
        for key in change.written()
        if key in change.now and (change.place, key) not in moving
    ]


def _is_settled(change: Written) -> bool:
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
        return list(before) == list(now) and all(_same(before[key], now[key]) for key in before)
    return isinstance(before, (bool, int, float, complex, str, bytes, set, frozenset, torch.dtype)) and before == now


# -- who looks at what stays ------------------------------------------------------------------------------


def _looked_at(places: list[tuple[Change, Any]], module: nn.Module, compare: Callable[[], str]) -> frozenset[Note]:
    """The places whose values decide what the forward computes, or may do so."""
    if not places:
        return frozenset()
    before, looked = Snapshot(module), set[Note]()
    for change, key in places:
        note = change.place, key
        with suppress(Exception):  # a place that takes no other value keeps its own
            change.put(key, stand_in(change.now[key], lambda note=note: looked.add(note)))  # type: ignore[misc]
    try:
        failed = bool(compare())
    except Exception:  # what no stand-in can be put for, such as a number that an operation of torch takes
        failed = True
    before.restore(everything=True)
    if not failed:
        return frozenset(looked)
    if len(places) == 1 or len(places) > _ALONE:
        return frozenset((change.place, key) for change, key in places)
    return frozenset().union(*(_looked_at([place], module, compare) for place in places))


def stand_in(value: Any, tell: Callable[[], object]) -> Any:
    """What behaves like a value and tells when it is looked at."""
    if type(value) in (Tensor, nn.Parameter, nn.Buffer):
        seen = value.detach().as_subclass(_SeenTensor)
        seen._tell = tell
        return seen
    return _Seen(value, tell)


class _SeenTensor(Tensor):
    """Stands for a tensor: every operation on it is told, and done."""

    _tell: Callable[[], object]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(value: Any) -> Any:
            if type(value) is not cls:
                return value
            if "_tell" in vars(value):
                value._tell()
            with torch._C.DisableTorchFunctionSubclass():
                return value.as_subclass(Tensor)

        args, kwargs = torch.utils._pytree.tree_map(plain, (args, kwargs or {}))
        return function(*args, **kwargs)


class _Seen:
    """Stands for any other value: whatever is done with it is told, and done."""

    def __init__(self, value: Any, tell: Callable[[], object]) -> None:
        self._value, self._tell = value, tell

    __class__ = property(lambda self: type(self._value))  # type: ignore[assignment] # for isinstance()

    def __getattr__(self, name: str) -> Any:
        self._tell()
        return getattr(self._value, name)


def _plain(value: Any) -> Any:
    return value._value if issubclass(type(value), _Seen) else value


_BUILT_IN: dict[str, Callable[..., Any]] = {
    "__bool__": bool, "__complex__": complex, "__float__": float, "__format__": format, "__hash__": hash,
    "__int__": int, "__iter__": iter, "__len__": len, "__repr__": repr, "__reversed__": reversed, "__round__": round,
    "__str__": str,
}  # fmt: skip


def _told(name: str, swapped: bool = False) -> Callable[..., Any]:
    compute = _BUILT_IN.get(name) or getattr(operator, name)

    def method(self: _Seen, *arguments: Any) -> Any:
        self._tell()
        values = [self._value, *map(_plain, arguments)]
        return compute(*(reversed(values) if swapped else values))

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"):
    setattr(_Seen, f"__{_name}__", _told(f"__{_name}__"))
    setattr(_Seen, f"__r{_name}__", _told(f"__{_name}__", swapped=True))
for _name in (
    "lt", "le", "gt", "ge", "eq", "ne", "bool", "int", "float", "complex", "index", "hash", "round", "len", "iter",
    "str", "repr", "format", "getitem", "setitem", "delitem", "contains", "reversed", "call", "neg", "pos", "abs",
    "invert", "lshift", "rshift",
):  # fmt: skip
    setattr(_Seen, f"__{_name}__", _told(f"__{_name}__"))
