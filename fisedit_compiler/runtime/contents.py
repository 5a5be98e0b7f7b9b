"""Numbers for the contents of tensors: two tensors with equal contents have one number.

What was computed from an input is found again by its number. A pipeline passes the same tensors at every call of a
run, so almost always nothing is compared: comparing means waiting for the device.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

Contents = tuple[str, int]
"""Marked by a name, so that a number of contents is never taken for a value."""


@dataclass(eq=False)
class _Known:
    """A tensor kept alive, so that identity means equality.

    Inference tensors have no version counter, so a write to one goes unseen: a copy is kept instead, and compared.
    """

    value: Tensor
    version: int
    contents: Contents

    @classmethod
    def of(cls, value: Tensor, contents: Contents) -> _Known:
        if value.is_inference():
            value = value.clone()
        return cls(value, version(value), contents)

    def is_same(self, value: Tensor) -> bool:
        return self.value is value and self.version == version(value)

    def is_equal(self, value: Tensor) -> bool:
        known = self.value
        same = known.shape == value.shape and known.dtype == value.dtype and known.device == value.device
        # A kept tensor that was written to since no longer tells what its number stands for.
        return same and self.version == version(known) and torch.equal(known, value)


def version(value: Tensor) -> int:
    """How often a tensor was written to in place; always 0 for inference tensors, where nobody counts."""
    return 0 if value.is_inference() else value._version


class ContentNumbers:
    """Numbers by input name; of each name the contents seen last are remembered."""

    def __init__(self) -> None:
        self._known: dict[str, list[_Known]] = {}
        self._numbers = count()

    def clear(self) -> None:
        """Forget all tensors; their numbers are not given again."""
        self._known.clear()

    def fork(self) -> ContentNumbers:
        """The same tensors known, remembered and forgotten apart from now on; no new number is given by both."""
        other = copy(self)
        other._known = {name: list(known) for name, known in self._known.items()}
        return other

    def of(self, name: str, value: Tensor, kept: int) -> Contents:
        """The number of a tensor's contents.

        Args:
            name: the input; numbers of different inputs are not compared.
            value: any tensor.
            kept: contents of this name to remember.
        """
        known = self._known.setdefault(name, [])
        found = next((entry for entry in known if entry.is_same(value)), None)
        if found is None:
            found = next((entry for entry in reversed(known) if entry.is_equal(value)), None)
            contents = (name, next(self._numbers)) if found is None else found.contents
            if found is not None:
                known.remove(found)
            # The tensor at hand is the one that comes again, whatever it was equal to.
            known.append(_Known.of(value, contents))
            del known[:-kept]
            return contents
        if found is not known[-1]:
            known.remove(found)
            known.append(found)
        return found.contents
