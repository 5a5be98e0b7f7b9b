"""A small example of a program's values: what kinds of slots are tried on (``trial.py``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import Tensor

from fisedit_compiler.graph.layout import Layout
from fisedit_compiler.graph.sizes import BATCH, HEIGHT, WIDTH, row_symbol
from fisedit_compiler.graph.specs import ValueSpec
from fisedit_compiler.slots.base import Slot
from fisedit_compiler.slots.turn import Turn

Values = Mapping[str, Tensor]
"""Dense values by origin."""
Shape = tuple[int, ...]

SAMPLES = 2
LATTICES = ((1, 2), (2, 3), (2, 4), (4, 8), (8, 16))
"""Values of ``h`` and ``w`` to choose from: the first that gives every level enough sites."""
FEWEST_SITES = 6
OTHER_SIZE = 3
"""Of a text, and of whatever else a call may choose."""
EDITED = ((0, 2, 4), (1, 2, 4))
"""The sites that each of two edits writes: some are written twice, the last one and some others never."""


@dataclass(frozen=True)
class Use:
    """How a program uses a slot.

    Attributes:
        slot: the slot.
        value: spec of the dense value.
        loaded: spec of what readers get; ``None`` if only slots that are about it do.
        rows: spec of the rows that an edit computes of it, ``None`` if edits write none.
        whole: whether an edit computes it anew, as readers get it.
    """

    slot: Slot
    value: ValueSpec
    loaded: ValueSpec | None = None
    rows: ValueSpec | None = None
    whole: bool = False


class NoExample(Exception):
    """No small sizes fit the shapes."""


class Example:
    """Values for some slots of one program.

    Raises:
        NoExample: there are none.
    """

    def __init__(self, uses: Sequence[Use], device: str) -> None:
        self.device = torch.device(device)
        self.specs = {use.slot.origin: use.value for use in uses}
        self.layouts: dict[str, Layout] = {use.slot.origin: use.slot.layout for use in uses}
        forms = [spec for use in uses for spec in (use.value, use.loaded, use.rows) if spec is not None]
        self._symbols = {symbol for spec in forms for size in spec.shape for symbol in _sized(size).free_symbols}
        self.sizes = self._fitting(forms)
        self._generator = torch.Generator().manual_seed(0)

    @property
    def has_sites(self) -> bool:
        """Whether edits can be tried."""
        return all(layout.is_rows for layout in self.layouts.values())

    @cached_property
    def values(self) -> Values:
        """Dense values, zero at their last sites."""
        found = {}
        for origin, spec in self.specs.items():
            value, layout = self.random(self.shape(spec), spec.dtype), self.layouts[origin]
            if layout.is_rows:
                sites = torch.tensor([self._count(origin) - 1], device=self.device)
                value = layout.flat.write(value, sites, torch.zeros_like(layout.flat.gather(value, sites)))
            found[origin] = value
        return found

    def shape(self, spec: ValueSpec) -> Shape:
        """A shape in numbers.

        Raises:
            NoExample: one of its sizes is none.
        """
        return _shape(spec, self.sizes)

    def random(self, shape: Shape, dtype: torch.dtype) -> Tensor:
        """Any value."""
        if dtype.is_floating_point or dtype.is_complex:
            drawn = torch.randn(shape, generator=self._generator, dtype=torch.complex64 if dtype.is_complex else None)
        else:
            drawn = torch.randint(0, 2 if dtype is torch.bool else 100, shape, generator=self._generator)
        return drawn.to(self.device, dtype)

    def turn(self, number: int) -> Turn:
        """The sites of one edit."""
        levels = {layout.level for layout in self.layouts.values() if layout.level is not None}
        sites = torch.tensor(EDITED[number], device=self.device)
        return Turn(dict.fromkeys(levels, sites))

    def edited(self, values: Values, turn: Turn) -> Values:
        """The values with others at the sites of an edit."""
        found = {}
        for origin, value in values.items():
            layout, sites = self.layouts[origin], _sites(self.layouts[origin], turn)
            rows = layout.flat.gather(value, sites)
            found[origin] = layout.flat.write(value, sites, self.random(tuple(rows.shape), rows.dtype))
        return found

    def rows(self, use: Use, values: Values, turn: Turn) -> Tensor | None:
        """The rows that an edit computes, in the order of axes that its spec tells; ``None`` if it tells none."""
        order, spec = use.slot.layout.packed, use.rows
        assert spec is not None and use.slot.layout.level is not None
        due = order.spec(use.value, row_symbol(use.slot.layout.level))
        places = [axis for axis, size in enumerate(spec.shape) if size == due.shape[order.site_dim]]
        sizes = list(due.shape)
        sizes.insert(places[0] if places else 0, sizes.pop(order.site_dim))
        if not places or tuple(sizes) != spec.shape or due.dtype != spec.dtype:
            return None
        gathered = order.gather(values[use.slot.origin], _sites(use.slot.layout, turn))
        return gathered.movedim(order.site_dim, places[0]).contiguous()

    def sample(self, values: Values, number: int) -> Values:
        """One sample of the values; those that have none stay."""
        found = {}
        for origin, value in values.items():
            axes = self.sample_axes(origin)
            found[origin] = part(value, axes[0], number) if axes else value
        return found

    def sample_axes(self, origin: str) -> list[int]:
        """The dense axes that count samples."""
        spec = self.specs[origin]
        return [
            axis
            for axis, (size, number) in enumerate(zip(spec.shape, self.shape(spec), strict=True))
            if BATCH in _sized(size).free_symbols and number % SAMPLES == 0
        ]

    def _count(self, origin: str) -> int:
        shape = self.shape(self.specs[origin])
        return int(sympy.prod([shape[axis] for axis in self.layouts[origin].axes]))

    def _fitting(self, forms: Sequence[ValueSpec]) -> Mapping[sympy.Symbol, int]:
        levels = {layout.level for layout in self.layouts.values() if layout.level is not None}
        rows = {row_symbol(level): len(EDITED[0]) for level in levels}
        for height, width in LATTICES:
            self.sizes = {**dict.fromkeys(self._symbols, OTHER_SIZE), **rows}
            self.sizes = {**self.sizes, BATCH: SAMPLES, HEIGHT: height, WIDTH: width}
            try:
                shapes = [self.shape(spec) for spec in forms]
            except NoExample:
                continue
            if not levels or (shapes and min(map(self._count, self.layouts)) >= FEWEST_SITES):
                return self.sizes
        raise NoExample


def part(value: Tensor, axis: int, number: int) -> Tensor:
    """The part of a value that belongs to one sample."""
    size = value.shape[axis] // SAMPLES
    return value.narrow(axis, number * size, size)


def _sites(layout: Layout, turn: Turn) -> Tensor:
    assert layout.level is not None
    return turn.sites[layout.level]


def _shape(spec: ValueSpec, sizes: Mapping[sympy.Symbol, int]) -> Shape:
    numbers = {symbol: sympy.Integer(size) for symbol, size in sizes.items()}
    shape = tuple(_sized(size).xreplace(numbers) for size in spec.shape)
    if not all(size.is_Integer and size >= 0 for size in shape):
        raise NoExample(f"{list(spec.shape)} has a size that is none")
    return tuple(map(int, shape))


def _sized(size: Any) -> sympy.Expr:
    try:
        return sympy.sympify(size, strict=True)
    except sympy.SympifyError:
        raise NoExample(f"{size!r} is no size") from None
