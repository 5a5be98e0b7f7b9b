"""Kinds of slots by name: this package's own and those that other packages register."""

from __future__ import annotations

import copy
import inspect
import re
from dataclasses import fields
from typing import TypeVar

from fisedit_compiler.errors import ConfigError
from fisedit_compiler.slots.asking import ANSWERS, said
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
    is_share = isinstance(kind.rounding, (int, float)) and 0 <= kind.rounding < 1
    if kind.holds not in ("value", "packed", "else", "derived") or not is_share:
        raise ConfigError(
            f'Slot kind {kind.name!r}: holds is "value", "packed", "else" or "derived", and rounding a share from 0 to '
            f"1; got {kind.holds!r} and {kind.rounding!r}."
        )
    for method in ANSWERS:
        if not callable(getattr(kind, method)):
            raise ConfigError(f"Slot kind {kind.name!r}: {method} is {getattr(kind, method)!r}, and must be a method.")
    if inspect.isabstract(kind):
        missing = " and ".join(f"{name}()" for name in sorted(kind.__abstractmethods__))
        raise ConfigError(f"Slot kind {kind.name!r} does not say everything: define {missing}.")
    if kind.rounding and kind.holds in ("value", "packed"):
        raise ConfigError(
            f"Slot kind {kind.name!r} says that it holds the {kind.holds} and that reading it rounds; outputs and "
            'inputs are compared with such slots bit for bit. Say holds = "else".'
        )
    _check_parameters(kind)
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
    if not isinstance(name, str) or name not in _KINDS:
        raise ConfigError(
            f"No slot kind is called {name!r}; there are {sorted(_KINDS)}. Another package's kind is there once the "
            "module that registers it (fisedit_compiler.extend.register_slot_kind) is imported."
        )
    return _KINDS[name]


def is_own(kind: SlotKind) -> bool:
    """Whether a kind is one of this package."""
    return type(kind).__module__.startswith(f"{__package__}.")


def check_kind(kind: object, slot: str = "") -> None:
    """Check that a slot may be of a kind.

    Raises:
        ConfigError: it is no registered one, or has parameters by which it is not told apart from others.
    """
    if not isinstance(kind, SlotKind):
        raise ConfigError(f"A slot's kind is a fisedit_compiler.extend.SlotKind, such as Canvas(); got {kind!r}.")
    if slot_kind(kind.name) is not type(kind):
        raise ConfigError(f"{type(kind).__qualname__} is not the registered slot kind {kind.name!r}; register it.")
    _check_parameters(type(kind))
    unknown = sorted(set(vars(kind)) - {item.name for item in fields(kind)})
    where = f" of slot {slot}" if slot else ""
    if unknown:
        raise ConfigError(f"Slot kind {kind.name!r}{where} keeps {', '.join(unknown)}, {_NOT_TOLD_APART}")
    try:
        if (type(kind), kind) in _compared:
            return
        again = copy.deepcopy(kind)
        same = bool(kind == again) and hash(kind) == hash(again)
    except Exception as error:
        raise ConfigError(
            f"Slot kind {kind.name!r}{where}: {kind!r} cannot be compared, hashed and copied ({said(error)}). {_FIELDS}"
        ) from error
    if not same:
        raise ConfigError(f"Slot kind {kind.name!r}{where}: {kind!r} is not equal to a copy of itself. {_FIELDS}")
    _compared.add((type(kind), kind))


_FIELDS = "Let its fields be numbers, texts, dtypes, or tuples or frozen dataclasses of them."
_compared: set[tuple[type[SlotKind], SlotKind]] = set()
"""Kinds that were found equal to their copies."""


_NOT_TOLD_APART = (
    "which equality does not see, so that slots of other parameters would be shared. Make the kind a "
    "@dataclass(frozen=True) whose parameters are fields, below @register_slot_kind."
)


def _check_parameters(kind: type[SlotKind]) -> None:
    """Check that instances of other parameters are not equal.

    Raises:
        ConfigError: they may be.
    """
    for item in kind.__mro__[: kind.__mro__.index(SlotKind)]:
        settings = vars(item).get("__dataclass_params__")
        if settings is None:
            own = [name for name in ("__init__", "__new__", "__eq__", "__hash__") if name in vars(item)]
            if own:
                raise ConfigError(f"Slot kind {kind.name!r}: {item.__qualname__} defines {own[0]}, {_NOT_TOLD_APART}")
        elif not settings.eq:
            raise ConfigError(f"Slot kind {kind.name!r}: {item.__qualname__} says eq=False, {_NOT_TOLD_APART}")
    ignored = [item.name for item in fields(kind) if not item.compare or item.hash is False]
    if ignored:
        raise ConfigError(f"Slot kind {kind.name!r} has field {ignored[0]}, {_NOT_TOLD_APART}")
