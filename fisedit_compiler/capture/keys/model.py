"""The key of one module over time: read when something may have changed, trusted while nothing has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from fisedit_compiler.capture.keys.notes import Note
from fisedit_compiler.capture.keys.structure import Structure, read_structure
from fisedit_compiler.capture.keys.weights import Weights


class ModelKey(NamedTuple):
    """What a module computes with.

    Attributes:
        structure: digest of everything that decides which program it is.
        weights: digest of the contents of its parameters and buffers.
    """

    structure: str
    weights: str


class ModelState:
    """Knows a module's key. Reads it whole only after the watch has seen a change."""

    def __init__(self, module: nn.Module, kept: int = 16) -> None:
        self.module, self._kept = module, kept
        self.notes: frozenset[Note] = frozenset()
        self._current: Structure | None = None
        self._changed_unseen = 0
        self._parts: dict[str, dict[str, str]] = {}
        self._weights = Weights()
        self._constants, self._contents = Weights(), ""
        self._key = ModelKey("", "")

    @property
    def structure(self) -> Structure:
        """The structure as it was read last, or now if the watch sees a change."""
        # Addresses move with the forms of tensors: ``module.half()`` leaves every parameter the object it was.
        if self._current is None or self._weights.moved() or self._current.watch.changed():
            self._current = read_structure(self.module, self.notes)
            self._contents = self._constants.key(self._current.constants)
            self._parts[self._current.key] = self._current.parts
            while len(self._parts) > self._kept:
                del self._parts[next(iter(self._parts))]
        return self._current

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Parameters and buffers by path, as the structure was read last; one that has two paths may be under one."""
        return {} if self._current is None else self._current.tensors

    @property
    def known(self) -> ModelKey:
        """The key as it was read last."""
        return self._key

    def read(self) -> ModelKey:
        """The module's key now. Contents of weights are compared, so it may wait for the device for a millisecond."""
        structure = self.structure
        if self._constants.key(structure.constants) != self._contents:
            self._current = None  # written to where no version is counted
            structure = self.structure
        named = f"{structure.key} {self._changed_unseen}" if self._changed_unseen else structure.key
        self._key = ModelKey(named, self._weights.key(structure.tensors))
        return self._key

    @property
    def moves(self) -> int:
        """How often weights were seen to have moved, whether or not they came back."""
        return self._weights.moves

    def moved(self) -> bool:
        """Whether torch knows of a write to a weight, or of an exchange of its memory, since the key was read."""
        return self._weights.moved()

    def glance(self) -> ModelKey:
        """The module's key by what can be seen without reading weights: for between two calls of a run."""
        assert self._current is not None
        if self._current.watch.changed() or self._weights.moved():
            return self.read()
        return self._key

    @property
    def is_portable(self) -> bool:
        """Whether the key means the same in another process."""
        return self.structure.portable and not self._changed_unseen

    def disown(self) -> None:
        """Give every structure another key from now on: the module was seen to have changed where nothing is read."""
        self._changed_unseen += 1

    def leave_out(self, notes: frozenset[Note]) -> None:
        """Leave places out that the module's own forward has been seen to write and not to depend on."""
        if not notes <= self.notes:
            self.notes |= notes
            self._current = None

    def differences(self, now: str, then: str) -> list[str]:
        """Paths of the submodules in which two structures differ, as far as both are remembered."""
        left, right = self._parts.get(now), self._parts.get(then)
        if left is None or right is None:
            return []
        return Structure(parts=left).differences(Structure(parts=right))
