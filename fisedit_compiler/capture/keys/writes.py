"""How often dictionaries were written to: shortcuts that Python and torch offer, and that nothing relies on.

Dynamo's guards have a version for every dictionary. On Python 3.11 the interpreter counts for each one; asking costs
less than comparing a large one. From 3.12 on torch watches the dictionaries that it was asked about and numbers all
events of all of them in one row. So a dictionary that is asked about for the first time tells the number of events so
far, and one question stands for all dictionaries of a model: :func:`clock`.

Both are private to torch. Whether they do what is said here is tried once; if not, dictionaries are compared.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from functools import cache
from itertools import count
from types import MappingProxyType
from typing import Any

import torch

dict_version: Callable[[Any], int] | None = getattr(torch._C._dynamo.guards, "dict_version", None)


class Clock:
    """A reading that changes with every write to any dictionary that was wound up with it."""

    def __init__(self, version: Callable[[Any], int]) -> None:
        self.version = version
        """The number of the last event of a dictionary that is watched."""
        self._last = version({})
        self._readings = count()
        self._reading = next(self._readings)

    def watch(self, values: Any) -> bool:
        """Count writes to a dictionary, or to a class's, from now on; whether that is possible.

        One that is empty must be looked at all the same: filling it at once is not counted.
        """
        values = dictionary_of(values)
        if not isinstance(values, dict):
            return False
        self.version(values)
        return True

    def read(self) -> int:
        """The reading. With several threads it may also change where nothing was written."""
        now = self.version({})
        if now != self._last + 1:
            self._reading = next(self._readings)
        self._last = now
        return self._reading


def dictionary_of(values: Any) -> Any:
    """The dictionary behind a class's, which shows itself as a proxy only; anything else as it is."""
    return gc.get_referents(values)[0] if isinstance(values, MappingProxyType) else values


@cache
def clock() -> Clock | None:
    """The clock of this process; ``None`` where torch or Python do not number events in one row."""
    if dict_version is None or tuple(sys.version_info) < (3, 12):
        return None
    made = Clock(dict_version)
    return made if _runs(made) else None


def _runs(made: Clock) -> bool:
    """Whether every kind of write is seen, and nothing else."""

    class Sample:
        pass

    sample, table = Sample(), {"a": 1}
    sample.__dict__.update(table)
    watched = all(map(made.watch, (vars(sample), table, vars(Sample))))
    readings = [made.read(), made.read()]
    for write in (
        lambda: setattr(sample, "a", 2), lambda: table.update(b=1), lambda: table.pop("b"), table.clear,
        lambda: setattr(Sample, "c", 3), lambda: delattr(sample, "a"),
    ):  # fmt: skip
        write()
        readings.append(made.read())
    readings.append(made.read())
    return watched and readings[0] == readings[1] and readings[-1] == readings[-2] and len(set(readings)) == 7
