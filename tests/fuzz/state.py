"""What a generated program is at between two of its steps, and what a kind of step must say of itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from tests.fuzz.axes import Axes, constant_size, is_constant, text

TEXT_TOKENS, TEXT_CHANNELS = 5, 6
MAX_RANK = 6


class Step(NamedTuple):
    """One line of a program."""

    name: str
    args: tuple[Any, ...] = ()

    def __str__(self) -> str:
        shown = [text(item) if self.name in ("reshape", "view") else repr(item) for item in self.args]
        return f"{self.name}({', '.join(shown)})"


@dataclass(frozen=True)
class State:
    """The running value's axes, and the ``(channels, divisor)`` of every map that was kept."""

    axes: Axes
    kept: tuple[tuple[int, int], ...] = ()

    @property
    def rank(self) -> int:
        return len(self.axes)

    @property
    def map(self) -> tuple[int, int] | None:
        """``(channels, divisor)`` if the value is ``[batch, channels, height, width]``."""
        if self.rank != 4 or [[part.role for part in axis] for axis in self.axes] != [["b"], ["c"], ["h"], ["w"]]:
            return None
        return constant_size(self.axes[1]), self.axes[2][0].divisor


@dataclass
class Call:
    """What a running program has at hand."""

    sizes: dict[str, int]
    text: Tensor | None
    kept: list[Tensor] = field(default_factory=list)


Candidates = Callable[[State], Iterator[tuple[Any, ...]]]
Run = Callable[[Tensor, tuple[Any, ...], Any, Call], Tensor]
Build = Callable[[State, tuple[Any, ...]], nn.Module | None]


@dataclass(frozen=True)
class Kind:
    """How steps of one name are proposed, built and run, and what they make of the state."""

    candidates: Candidates
    run: Run
    build: Build = lambda state, args: None
    after: Callable[[State, tuple[Any, ...]], State] = lambda state, args: state
    reads_text: bool = False


def always(*options: Any) -> Candidates:
    return lambda state: ((option,) for option in options)


def any_axis(state: State) -> Iterator[tuple[Any, ...]]:
    return ((axis,) for axis in range(state.rank))


def constant_axis(state: State) -> Iterator[tuple[Any, ...]]:
    return ((index,) for index, axis in enumerate(state.axes) if is_constant(axis) and constant_size(axis) > 1)


def last_constant(state: State) -> Iterator[tuple[Any, ...]]:
    if state.axes and is_constant(state.axes[-1]) and constant_size(state.axes[-1]) > 1:
        yield ()


def of_maps(*options: tuple[Any, ...]) -> Candidates:
    return lambda state: iter(options if state.map else ())


def width(state: State, axis: int = -1) -> int:
    return constant_size(state.axes[axis])
