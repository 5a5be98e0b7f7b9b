"""What a module could read at one moment: what was written since, and how to put it back."""

from __future__ import annotations

from collections.abc import MutableMapping, MutableSequence, MutableSet

from torch import nn

from fisedit_compiler.keys.notes import Note
from fisedit_compiler.keys.structure import read_structure

_CONTAINERS = (MutableMapping, MutableSequence, MutableSet)


class Snapshot:
    """Everything that a module's forward can read, weights apart, at the moment when this is made."""

    def __init__(self, module: nn.Module) -> None:
        self._watch = read_structure(module).watch
        # The module's own attributes, and the containers that they are.
        self._own = {id(vars(part)) for part in module.modules()}
        self._own |= {
            id(value) for part in module.modules() for value in vars(part).values() if isinstance(value, _CONTAINERS)
        }

    def written(self) -> frozenset[Note]:
        """The places that hold something else now."""
        return frozenset(note for change in self._watch.changes() for note in change.notes())

    def restore(self) -> None:
        """Put back what was on the module itself; elsewhere, where others may write too, what a capture left."""
        for change in list(self._watch.changes()):
            change.undo(everything=id(change.live) in self._own)
