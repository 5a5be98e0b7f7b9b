"""The values of one bundle: computed one by one, or side by side in one buffer by a CUDA graph.

A call of an edit finds the second kind in a few microseconds: where the values lie in the buffer is known, so neither a
view nor an address is made of any of them unless somebody asks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from fisedit_compiler.kernels.addresses import ALIGNMENT, address_table

Layout = tuple[Any, ...]


class BundleValues(Protocol):
    """Values by name."""

    @property
    def layout(self) -> Layout:
        """Shapes, strides and dtypes, in the bundle's order; hashable."""

    @property
    def addresses(self) -> Tensor:
        """int64 ``[len]`` on the values' device, in the bundle's order; only read while the values are alive."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that are kept alive."""

    @property
    def device(self) -> torch.device:
        """Where the values are."""

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Let no memory be given to others before what was launched on this stream is over."""

    def __getitem__(self, name: str) -> Tensor: ...

    def __contains__(self, name: object) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...

    def __len__(self) -> int: ...


class SeparateValues(dict[str, Tensor]):
    """Values that are tensors of their own."""

    @cached_property
    def layout(self) -> Layout:
        return tuple(_form(value) for value in self.values())

    @cached_property
    def addresses(self) -> Tensor:
        return address_table(list(self.values()), self.device)

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.values())

    @property
    def device(self) -> torch.device:
        return next(iter(self.values())).device

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        for value in (*self.values(), self.addresses):
            value.record_stream(stream)


@dataclass(frozen=True)
class _Place:
    """Where in the buffer one value lies."""

    start: int
    nbytes: int
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype

    def view(self, flat: Tensor) -> Tensor:
        part = flat[self.start : self.start + self.nbytes].view(self.dtype)
        return part.as_strided(self.shape, self.strides)


class FlatLayout:
    """Where the values of one bundle lie in a buffer of ``nbytes`` bytes."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        """``values`` are dense examples."""
        self.places: dict[str, _Place] = {}
        self.nbytes = 0
        for name, value in values.items():
            self.places[name] = _Place(self.nbytes, value.nbytes, value.shape, value.stride(), value.dtype)
            self.nbytes += -(-value.nbytes // ALIGNMENT) * ALIGNMENT
        self.layout: Layout = tuple(_form(value) for value in values.values())
        starts = [place.start for place in self.places.values()]
        self.device = next(iter(values.values())).device
        self.starts = torch.tensor(starts, dtype=torch.int64, device=self.device)

    def buffer(self) -> Tensor:
        """A new buffer, uint8."""
        return torch.empty(self.nbytes, dtype=torch.uint8, device=self.device)

    def views(self, flat: Tensor) -> list[Tensor]:
        """All values in a buffer."""
        return [place.view(flat) for place in self.places.values()]


class FlatValues(Mapping[str, Tensor]):
    """Values that lie side by side in one buffer."""

    def __init__(self, where: FlatLayout, flat: Tensor) -> None:
        self.where, self.flat = where, flat
        self._views: dict[str, Tensor] = {}

    @property
    def layout(self) -> Layout:
        return self.where.layout

    @cached_property
    def addresses(self) -> Tensor:
        return self.where.starts + self.flat.data_ptr()

    @property
    def nbytes(self) -> int:
        return self.flat.nbytes

    @property
    def device(self) -> torch.device:
        return self.where.device

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        self.flat.record_stream(stream)
        self.addresses.record_stream(stream)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._views:
            self._views[name] = self.where.places[name].view(self.flat)
        return self._views[name]

    def __contains__(self, name: object) -> bool:
        return name in self.where.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.where.places)

    def __len__(self) -> int:
        return len(self.where.places)


def _form(value: Tensor) -> tuple[Any, ...]:
    return value.shape, value.stride(), value.dtype
