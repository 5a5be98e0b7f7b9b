"""Tensors of a piece of memory that are made when somebody asks for one: to make two hundred takes a host as long as a
GPU takes for a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import overload

from torch import Tensor

Make = Callable[[list[Tensor | None]], None]


class LateTensors(Sequence[Tensor]):
    """A row of tensors, some of which are made when one of them is asked for. Any thread may ask."""

    def __init__(self, made: list[Tensor | None], make: Make, nbytes: Sequence[int]) -> None:
        """``make`` puts a tensor in the place of every ``None`` of ``made``; ``nbytes`` are the bytes of each."""
        self._made, self._make, self.nbytes = made, make, nbytes

    @overload
    def __getitem__(self, place: int) -> Tensor: ...
    @overload
    def __getitem__(self, place: slice) -> list[Tensor]: ...
    def __getitem__(self, place: int | slice) -> Tensor | list[Tensor]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        value = self._made[place]
        if value is None:
            self._make(self._made)
            value = self._made[place]
            assert value is not None
        return value

    def __len__(self) -> int:
        return len(self._made)


class LateMapping(Mapping[str, Tensor]):
    """Some of them by name."""

    def __init__(self, tensors: LateTensors, places: Mapping[str, int]) -> None:
        """``places`` says where in the row each is."""
        self._tensors, self._places = tensors, places

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._places[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def nbytes_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all of them, without making any."""
    if isinstance(tensors, LateMapping):
        each = tensors._tensors.nbytes
        return sum(each[place] for place in tensors._places.values())
    return sum(value.nbytes for value in tensors.values())
