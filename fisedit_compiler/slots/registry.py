"""Kinds of slots by name: this package's own and those that other packages register."""

from __future__ import annotations

import inspect
import re
from typing import TypeVar

from fisedit_compiler.errors import ConfigError
from fisedit_compiler.slots.base import SlotKind

_KINDS: dict[str, type[SlotKind]] = {}
_Kind = TypeVar("_Kind", bound=type[SlotKind])


def register_slot_kind(kind: _Kind) -> _Kind:
    """Register a kind of slots (a class decorator), so that slots may be of it.

    Raises:
        ConfigError: it is no :class:`SlotKind`, or not a whole one; its name is taken; what it says contradicts itself.
    """
    if not (isinstance(kind, type) and issubclass(kind, SlotKind)):
        raise ConfigError(f"A slot kind is a subclass of fisedit_compiler.extend.SlotKind; got {kind!r}.")
    if "name" not in vars(kind):
        raise ConfigError(f"Slot kind {kind.__qualname__} has no `name` of its own; listings and pages show it.")
    if not isinstance(kind.name, str) or not re.fullmatch(r"[\w.-]+", kind.name):
        raise ConfigError(
            f"Slot kind {kind.__qualname__} is called {kind.name!r}; say letters, digits, dots and dashes."
        )
    if kind.holds not in ("value", "packed", "else") or not 0 <= kind.rounding < 1:
        raise ConfigError(
            f'Slot kind {kind.name!r}: holds is "value", "packed" or "else", and rounding a share from 0 to 1; got '
            f"{kind.holds!r} and {kind.rounding!r}."
        )
    if inspect.isabstract(kind):
        missing = " and ".join(f"{name}()" for name in sorted(kind.__abstractmethods__))
        raise ConfigError(f"Slot kind {kind.name!r} does not say everything: define {missing}.")
    if kind.rounding and kind.holds != "else":
        raise ConfigError(
            f"Slot kind {kind.name!r} says that it holds the {kind.holds} and that reading it rounds; outputs and "
            'inputs are compared with such slots bit for bit. Say holds = "else".'
        )
    known = _KINDS.setdefault(kind.name, kind)
    if (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
        raise ConfigError(f"A slot kind is called {kind.name!r} already: {known.__module__}.{known.__qualname__}.")
    _KINDS[kind.name] = kind  # the same again: its module was reloaded
    return kind


def slot_kind(name: str) -> type[SlotKind]:
    """The kind of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in _KINDS:
        raise ConfigError(
            f"No slot kind is called {name!r}; there are {sorted(_KINDS)}. Another package's kind is there once the "
            "module that registers it (fisedit_compiler.extend.register_slot_kind) is imported."
        )
    return _KINDS[name]


def check_kind(kind: object) -> None:
    """Check that slots may be of a kind.

    Raises:
        ConfigError: it is no registered one.
    """
    if not isinstance(kind, SlotKind):
        raise ConfigError(f"A slot's kind is a fisedit_compiler.extend.SlotKind, such as Canvas(); got {kind!r}.")
    if slot_kind(kind.name) is not type(kind):
        raise ConfigError(f"{type(kind).__qualname__} is not the registered slot kind {kind.name!r}; register it.")
