"""Writes values down one after the other, each once, and keeps a watch on every place it reads.

How a kind of value is written stands in ``values.py``, ``functions.py`` and ``structure.py``: functions of the reader
and the value. Here is what they share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisedit_compiler.capture.keys.code import is_installed
from fisedit_compiler.capture.keys.drawn import serial_number
from fisedit_compiler.capture.keys.notes import CONTENTS, Note, Notes
from fisedit_compiler.capture.keys.watch import Watch

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout)
_PLAIN_TOO = (torch.memory_format, torch.Size, range, slice, PurePath, type(Ellipsis), np.generic, np.dtype)
_OF_ENUMS = frozenset({"_name_", "__objclass__", "_sort_order_"})
_MAX_ITEMS, _MAX_DEPTH = 500_000, 150


class Reader:
    """One reading of one module.

    What is met again is written as before, so that it makes no difference whether two parts share one object (one
    attention processor for all layers) or have equal ones; whether a forward depends on that is the self-check's to
    find. Only parts of the module itself are named by their paths.

    Attributes:
        watch: notices that what was read has changed since.
        portable: whether everything could be read, so that what is written means the same in another process.
        tensors: parameters and buffers by path, whose contents are ``weights.py``'s business.
        constants: other tensors that were read, by number.
        packages: modules of installed packages that were met, whose own state is read at the end.
    """

    def __init__(self, write: Callable[[Reader, Any], None], notes: Iterable[Note], parts: Mapping[int, str]) -> None:
        """``write`` writes a value that is met for the first time; ``parts`` are paths of submodules by identity."""
        self.watch, self.portable = Watch(), True
        self.tensors: dict[str, Tensor] = {}
        self.constants: dict[str, Tensor] = {}
        self.packages: set[str] = set()
        self.parts = parts
        self._write = write
        self._notes = Notes(notes)
        self._out: list[str] = []
        self._trail: list[str] = []
        self._weights: dict[int, str] = {}
        self._digests: dict[int, str] = {}
        self._open: dict[int, int] = {}
        self._alive: list[Any] = []  # identities above stay unique while these live

    # -- writing ---------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        self._out.append(text)

    def digest(self, write: Callable[[], None]) -> str:
        """Digest of what ``write`` says."""
        outer, self._out = self._out, []
        try:
            write()
            return hashlib.sha256("\x1f".join(self._out).encode("utf-8", "surrogatepass")).hexdigest()
        finally:
            self._out = outer

    def visit(self, value: Any, step: str = "") -> None:
        """Write down a value; ``step`` leads to it from the place where the reader is."""
        if type(value) in PLAIN:
            self.say(f"{type(value).__name__} {value!r}")
        elif isinstance(value, Enum):
            self.say(f"{type(value).__qualname__}.{value.name}")
            self.visit(type(value))
            self._write_member(value, step)
        elif isinstance(value, _PLAIN_TOO) or _is_plain_tuple(value):
            self.say(f"{type(value).__name__} {value!r}")
        elif id(value) in self.parts:
            self.say(f"part {self.parts[id(value)]}")
        elif id(value) in self._weights:
            self.say(f"weight {self._weights[id(value)]}")
        elif id(value) in self._digests:
            self.say(self._digests[id(value)])
        elif id(value) in self._open:
            self.say(f"inside {self._open[id(value)]}")
        else:
            self._trail.append(step)
            self._first_visit(value)
            self._trail.pop()

    def _first_visit(self, value: Any) -> None:
        self._alive.append(value)
        self._open[id(value)] = len(self._open)
        large = len(self._open) > _MAX_DEPTH or len(self._alive) > _MAX_ITEMS
        steps = len(self._trail)
        try:
            digest = self.digest(lambda: self.opaque(value) if large else self._write(self, value))
        except Exception:  # somebody's own container or property that cannot be read here
            del self._trail[steps:]
            digest = self.digest(lambda: self.opaque(value))
        del self._open[id(value)]
        self._digests[id(value)] = digest
        self.say(digest)

    def _write_member(self, value: Enum, step: str) -> None:
        """What a member of a user's Enum has beside its name."""
        if is_installed(type(value).__module__) or not self.enter(value):
            return
        self._trail.append(step)
        read = self.attributes(vars(value))
        for name in sorted(read.keys() - _OF_ENUMS):
            self.say(f".{name}")
            self.visit(read[name], f".{name}")
        self._trail.pop()
        self.leave(value)

    def opaque(self, value: Any) -> None:
        """Write down that a value is itself: nothing more can be read of it."""
        self.portable = False
        self.say(f"opaque {type(value).__module__}.{type(value).__qualname__} {serial_number(value)}")

    def enter(self, value: Any) -> bool:
        """Whether a value that is written in parts is met for the first time on the way here; to be left again."""
        if id(value) in self._open:
            return False
        self._open[id(value)] = len(self._open)
        return True

    def leave(self, value: Any) -> None:
        del self._open[id(value)]

    # -- places ----------------------------------------------------------------------------------

    @property
    def place(self) -> str:
        """Where the reader is, in words: ``mid_block.attentions.0.processor``."""
        return "".join(self._trail)

    def start_at(self, place: str) -> None:
        """Go to a submodule, which is named by its path."""
        self._trail = [place]

    def attributes(self, values: Mapping[str, Any], owner: type | None = None) -> Mapping[str, Any]:
        """What is read of an object's, a module's or a class's attributes; watched from now on."""
        place = self.place
        if place in self._notes:
            return self._part(place, values)
        self.watch.attributes(values, place, owner)
        return values

    def elements(self, value: Any) -> Mapping[Any, Any] | None:
        """What is read of a list, dictionary or set, by key; ``None``: all of it. Watched from now on."""
        place = self.place
        if place in self._notes:
            return self._part(place, value)
        self.watch.container(value, place)
        return None

    def _part(self, place: str, value: Any) -> Mapping[Any, Any]:
        self.watch.part(value, lambda live: self._notes.part(place, live))
        return self._notes.part(place, value)

    def attribute(self, value: Any, name: str) -> bool:
        """Watch one slot of an object, or the contents of a cell; whether it is to be read."""
        if self._notes and self._notes.leaves_out(self.place, name):
            return False
        self.watch.attribute(value, name, self.place)
        return True

    def item(self, values: dict[str, Any], name: str, place: str) -> bool:
        """Watch one global; whether it is to be read."""
        if self._notes and self._notes.leaves_out(place, name):
            return False
        self.watch.item(values, name, place)
        return True

    def reads_contents(self) -> bool:
        """Whether the numbers are read of the array or tensor where the reader is."""
        return not self._notes or not self._notes.leaves_out(self.place, CONTENTS)

    def weight(self, path: str, name: str, tensor: Tensor) -> bool:
        """Give a parameter or buffer its path; whether it is new, not tied to another."""
        if id(tensor) in self._weights:
            self.say(f"{name} tied to {self._weights[id(tensor)]}")
            return False
        while path in self.tensors:
            path += "'"  # of a module that is no part of the tree, and has no path of its own
        self._weights[id(tensor)] = path
        self.tensors[path] = tensor
        return True


def is_of_this_package(value: Any) -> bool:
    """Whether a value is the compiler's own, such as the wrapped module that a user's hook asks for its mode."""
    return type(value).__module__.startswith("fisedit_compiler.") and "models" not in type(value).__module__


def _is_plain_tuple(value: Any) -> bool:
    """Whether an equal tuple may stand for this one: which of them are one object differs from process to process."""
    return type(value) is tuple and all(type(item) in PLAIN for item in value)
