"""The registry of methods: what has a name on the command line, and what it expands to."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fisedit_compiler.errors import ConfigError
from fisedit_compiler.evaluation.methods.bench import Bench, Case, Outcome

REFERENCES = ("dense", "sparse")
"""Methods that always run: the others are measured against their pictures and their mask."""

_MODULES = ("fisedit_compiler.evaluation.methods.methods", "fisedit_compiler.evaluation.methods.variants")

Suite = str
SUITES: tuple[Suite, ...] = ("methods", "approximations", "reuse")


@dataclass(frozen=True)
class Method:
    """One way to edit, with its parameter if it has one.

    Attributes:
        name: as on the command line, ``sdedit@0.5``.
        title: for tables.
        run: makes the edit; may raise :class:`~fisedit_compiler.evaluation.methods.bench.NotApplicable`.
        family: the name without the parameter; methods of one family are a curve.
        parameter: strength, share of steps, ...
    """

    name: str
    title: str
    run: Callable[[Bench, Case], Outcome] = field(repr=False)
    family: str
    parameter: float | None = None


@dataclass(frozen=True)
class _Family:
    name: str
    title: str
    suites: tuple[Suite, ...]
    parameters: tuple[float, ...]
    function: Callable[..., Outcome]

    def methods(self, parameter: float | None = None) -> list[Method]:
        if not self.parameters:
            return [Method(self.name, self.title, self.function, self.name)]
        return [self._with(value) for value in (self.parameters if parameter is None else (parameter,))]

    def _with(self, parameter: float) -> Method:
        def run(bench: Bench, case: Case) -> Outcome:
            return self.function(bench, case, parameter)

        return Method(f"{self.name}@{parameter:g}", f"{self.title} {parameter:g}", run, self.name, parameter)


_FAMILIES: dict[str, _Family] = {}


def method(
    name: str, title: str, *suites: Suite, parameters: Sequence[float] = ()
) -> Callable[[Callable[..., Outcome]], Callable[..., Outcome]]:
    """Register a function ``(bench, case) -> Outcome``, or ``(bench, case, parameter)`` with ``parameters``.

    Args:
        name: on the command line.
        title: in tables.
        suites: of which it is part.
        parameters: values that the bare name stands for, each from above 0 to 1.

    Raises:
        ConfigError: the name is taken.
    """

    def register(function: Callable[..., Outcome]) -> Callable[..., Outcome]:
        if name in _FAMILIES:
            raise ConfigError(f"there is a method {name!r} already; choose another name")
        _FAMILIES[name] = _Family(name, title, suites, tuple(parameters), function)
        return function

    return register


def method_names() -> list[str]:
    """Names of all families, in the order of their registration."""
    _load()
    return list(_FAMILIES)


def choose_methods(names: Sequence[str] = (), suite: Suite = "methods") -> list[Method]:
    """The methods to run: those named, or a suite's; the references come first in any case.

    Args:
        names: of families (``sdedit``: all its default parameters) or with a parameter (``sdedit@0.6``).
        suite: one of :data:`SUITES`, used if no names are given.

    Raises:
        ConfigError: a name or a suite is unknown, or a parameter is wrong.
    """
    _load()
    if not names and suite not in SUITES:
        raise ConfigError(f"unknown suite {suite!r}; choose one of {', '.join(SUITES)}")
    wanted = list(names) or [family.name for family in _FAMILIES.values() if suite in family.suites]
    chosen: dict[str, Method] = {}
    for name in (*REFERENCES, *wanted):
        for item in _parse(name.strip()):
            chosen.setdefault(item.name, item)
    return list(chosen.values())


def _parse(name: str) -> list[Method]:
    family_name, _, text = name.partition("@")
    family = _FAMILIES.get(family_name)
    if family is None:
        raise ConfigError(f"unknown method {name!r}; choose from {', '.join(_FAMILIES)}")
    if "@" not in name:
        return family.methods()
    if not family.parameters:
        raise ConfigError(f"the method {family_name!r} has no parameter; write it without {'@' + text!r}")
    try:
        parameter = float(text)
    except ValueError:
        parameter = 0.0
    if not 0.0 < parameter <= 1.0:
        raise ConfigError(f"{name!r}: the parameter must be a number above 0 and up to 1, as in {family_name}@0.5")
    return family.methods(parameter)


def _load() -> None:
    """Import the modules that register the methods; they import this one."""
    for module in _MODULES:
        importlib.import_module(module)
