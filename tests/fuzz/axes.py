"""What a generated program knows of its value: the parts of batch, channels, rows and columns in each axis.

Written for the generator alone; nothing here is the compiler's, whose own inference of layouts is what is tried.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod

COARSEST = 4
"""Total downsampling that programs may reach: heights and widths are multiples of it."""


@dataclass(frozen=True)
class Part:
    """A factor of one axis.

    Attributes:
        role: ``b``, ``c``, ``h`` or ``w``.
        order: sorts the parts of one role from the slowest to the fastest.
        size: of a constant part; 0 for what follows the call's sizes.
        divisor: of the call's height or width, for what follows them.
    """

    role: str
    order: tuple[int, ...] = ()
    size: int = 0
    divisor: int = 1

    def measure(self, sizes: Mapping[str, int]) -> int:
        return self.size or sizes[self.role] // self.divisor

    def halves(self) -> tuple[Part, Part] | None:
        """The same factor as two, slow and fast, or ``None`` if it cannot be cut."""
        slow, fast = (*self.order, 0), (*self.order, 1)
        if self.size:
            if self.size % 2 or self.size == 2:
                return None
            return replace(self, order=slow, size=self.size // 2), replace(self, order=fast, size=2)
        if self.role == "b" or self.divisor * 2 > COARSEST:
            return None
        return replace(self, order=slow, divisor=self.divisor * 2), Part(self.role, fast, 2)

    def __str__(self) -> str:
        if self.size:
            return f"{self.role}{self.size}"
        return self.role if self.divisor == 1 else f"{self.role}/{self.divisor}"


Axis = tuple[Part, ...]
Axes = tuple[Axis, ...]


def canonical(channels: int, divisor: int) -> Axes:
    """``[batch, channels, height, width]``."""
    return (Part("b"),), (Part("c", (), channels),), (Part("h", (), 0, divisor),), (Part("w", (), 0, divisor),)


def is_constant(axis: Axis) -> bool:
    return all(part.size for part in axis)


def constant_size(axis: Axis) -> int:
    return prod(part.size for part in axis)


def measure(axis: Axis, sizes: Mapping[str, int]) -> int:
    """Entries of an axis, for the sizes of a call by role."""
    return prod(part.measure(sizes) for part in axis)


def parts_of(axes: Axes) -> list[Part]:
    return [part for axis in axes for part in axis]


def home(axes: Axes) -> tuple[Axes, list[int], Axes]:
    """How a value comes back to its canonical form: cut into parts, reordered, merged by role.

    Returns the axes of one part each, their new order, and the canonical axes.
    """
    apart = parts_of(axes)
    order = sorted(range(len(apart)), key=lambda index: ("bchw".index(apart[index].role), apart[index].order))
    channels = prod(part.size for part in apart if part.role == "c")
    size = prod(part.size or 1 for part in apart if part.role == "h")
    divisor = next(part.divisor for part in apart if part.role == "h" and not part.size) // size
    return tuple((part,) for part in apart), order, canonical(channels, divisor)


def text(axes: Iterable[Axis]) -> str:
    return "[" + ", ".join("*".join(map(str, axis)) or "1" for axis in axes) + "]"
