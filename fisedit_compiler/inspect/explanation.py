"""What ``explain()`` gives back: programs, a note, measured times; prints as tables, or as plain values."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import sympy

from fisedit_compiler.inspect.facts import ProgramExplanation
from fisedit_compiler.runtime.sessions.measured import Measured

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class Explanation:
    """What was compiled, and what it costs. Prints as tables (``rich.print``, ``print``, notebooks).

    Attributes:
        programs: one per call signature.
        note: what stands in the way of more, or how calls run, as a sentence; empty if there is nothing to say.
        measured: calls that the last sessions timed, by kind.
    """

    programs: tuple[ProgramExplanation, ...] = ()
    note: str = ""
    measured: tuple[Measured, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings, lists and dictionaries that ``json.dumps`` takes; formulas as strings."""
        converted: dict[str, Any] = _plain(asdict(self))
        for program, made in zip(converted["programs"], self.programs, strict=True):
            program["recorded_bytes"] = made.recorded_bytes
        return converted

    def __rich__(self) -> Group:
        from fisedit_compiler.inspect import tables  # brings rich along

        return tables.drawn(self.programs, self.note, self.measured)

    def __str__(self) -> str:
        from fisedit_compiler.inspect import tables

        return tables.as_text(self.__rich__())

    def _repr_html_(self) -> str:
        from fisedit_compiler.inspect import tables

        return tables.as_html(self.__rich__())


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, (sympy.Basic, Fraction)) else value
