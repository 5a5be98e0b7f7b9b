"""Numbers for the contents of tensors: two tensors with equal contents have one number.

What was computed from an input is found again by its number. Numbers stand for copies that nobody else can write to:
a caller's tensor may be rewritten through numpy, ``.data`` or dlpack, which no version counter notices, and its memory
may be another tensor's tomorrow. So contents are compared with the copies, bit for bit.

Comparing on a CUDA device means waiting for it. There the tensor that was seen last, unchanged as far as torch knows,
is taken for what it was, and the comparison runs behind the launch (:class:`Later`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from fisedit_compiler.errors import RecordingError
from fisedit_compiler.tensors.deferred import DeferredChecks

Contents = tuple[str, int]
"""Marked by a name, so that a number of contents is never taken for a value."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(eq=False)
class Later:
    """Comparisons that wait until the work of a call is launched.

    Attributes:
        pairs: what is to be compared: the input's name, a copy, and the tensor.
        alike: copies, by identity, that one tensor was compared with at one time, so that one of them tells for both.
            What the calls of a run have in common.
    """

    pairs: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    alike: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def defer(self, checks: DeferredChecks, forget: Callable[[], None]) -> None:
        """Launch the comparisons; one that turns out wrong is an error of ``checks``.

        Args:
            checks: where the outcomes are awaited.
            forget: called before the error is raised: what was computed may stand for other contents.
        """
        first: dict[int, Tensor] = {}
        for name, known, value in self.pairs:
            other = first.setdefault(id(value), known)
            both = id(other), id(known)
            if both in self.alike:
                continue  # copies never change
            if other is not known:
                self.alike[both] = other, known

            def rewritten(name: str = name) -> RecordingError:
                forget()
                return RecordingError(
                    f"The tensor passed as {name} was rewritten in the middle of a run where torch does not see it "
                    "(through .data, numpy, dlpack or a CUDA graph): calls since then used its earlier contents. "
                    "Write to it by torch's own operations, or pass a new tensor, and make the run again."
                )

            checks.add((_bits(known) != _bits(value)).any(), rewritten)
        self.pairs.clear()


@dataclass(eq=False)
class _Known:
    """Contents, as a copy, and the tensor that had them last, if it still exists."""

    copy: Tensor
    contents: Contents
    passed: weakref.ref[Tensor]
    version: int

    def is_passed(self, value: Tensor) -> bool:
        """Whether it is that tensor and torch knows of no write to it (nobody counts those to inference tensors)."""
        return self.passed() is value and not value.is_inference() and self.version == version(value)

    def pass_on(self, value: Tensor) -> None:
        self.passed, self.version = weakref.ref(value), version(value)


def version(value: Tensor) -> int:
    """How often a tensor was written to in place; always 0 for inference tensors, where nobody counts."""
    return 0 if value.is_inference() else value._version


def is_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same bit for bit, shape and dtype and device included. Waits for the device."""
    same = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
    return same and torch.equal(_bits(one), _bits(other))


def _bits(value: Tensor) -> Tensor:
    """The same memory as integers: so NaN is itself, and 0.0 is not -0.0."""
    if value.requires_grad:
        value = value.detach()
    if value.is_complex():
        value = torch.view_as_real(value.resolve_conj())
    if value.is_neg():
        value = value.resolve_neg()
    return value.view(_INTEGERS[value.element_size()])


class ContentNumbers:
    """Numbers by input name; of each name the contents seen last are remembered."""

    def __init__(self) -> None:
        self._known: dict[str, list[_Known]] = {}
        self._numbers = count()

    def clear(self) -> None:
        """Forget all tensors; their numbers are not given again."""
        self._known.clear()

    def fork(self) -> ContentNumbers:
        """The same contents known, remembered and forgotten apart from now on; no new number is given by both."""
        other = copy(self)
        other._known = {name: [copy(entry) for entry in known] for name, known in self._known.items()}
        return other

    def of(self, name: str, value: Tensor, kept: int, later: Later | None = None) -> Contents:
        """The number of a tensor's contents.

        Args:
            name: the input; numbers of different inputs are not compared.
            value: any tensor.
            kept: contents of this name to remember.
            later: on a CUDA device, take the tensor passed last for what it was and add the comparison here.
        """
        return self._entry(name, value, kept, later).contents

    def copy_of(self, name: str, value: Tensor, kept: int, later: Later | None = None) -> Tensor:
        """A copy of a tensor in memory that is nobody else's; arguments as of :meth:`of`.

        It is read only: all tensors of equal contents share it.
        """
        return self._entry(name, value, kept, later).copy

    def known(self, contents: Contents) -> Tensor:
        """The copy that a number stands for; it must be remembered still."""
        name, _ = contents
        return next(entry.copy for entry in reversed(self._known[name]) if entry.contents == contents)

    def _entry(self, name: str, value: Tensor, kept: int, later: Later | None) -> _Known:
        known = self._known.setdefault(name, [])
        entry = None
        if later is not None and value.is_cuda:
            entry = next((item for item in reversed(known) if item.is_passed(value)), None)
            if entry is not None:
                later.pairs.append((name, entry.copy, value))
        if entry is None:
            entry = next((item for item in reversed(known) if is_equal(item.copy, value)), None)
        if entry is None:
            number = (name, next(self._numbers))
            owned = value.detach().clone(memory_format=torch.contiguous_format)
            entry = _Known(owned, number, weakref.ref(value), version(value))
        else:
            entry.pass_on(value)
            known.remove(entry)
        known.append(entry)
        del known[:-kept]
        return entry
