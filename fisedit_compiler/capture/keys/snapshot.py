"""What a module could read at one moment: what was written since, and how to put it back."""

from __future__ import annotations

from collections.abc import MutableMapping, MutableSequence, MutableSet
from typing import Any

from torch import nn

from fisedit_compiler.capture.keys.notes import Change, Drawn, Note, Reordered, Rewritten
from fisedit_compiler.capture.keys.structure import read_structure

_CONTAINERS = (MutableMapping, MutableSequence, MutableSet)


class Snapshot:
    """Everything that a module's forward can read, weights apart, at the moment when this is made."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._watch = read_structure(module).watch
        self._tensors: list[tuple[Any, dict[str, Any]]] = [
            (tensors, dict(tensors)) for part in module.modules() for tensors in (part._parameters, part._buffers)
        ]
        # The module's own attributes, and the containers that they are.
        self._own = {id(vars(part)) for part in module.modules()}
        self._own |= {
            id(value) for part in module.modules() for value in vars(part).values() if isinstance(value, _CONTAINERS)
        }

    def changes(self) -> list[Change | Reordered | Rewritten | Drawn]:
        """The places that hold something else now."""
        return list(self._watch.changes())

    def written(self) -> frozenset[Note]:
        """What is written there, to be left out of a reading."""
        return frozenset(note for change in self.changes() for note in change.notes())

    def restore(self, *, everything: bool = False) -> None:
        """Put back what was on the module itself; elsewhere, where others may write too, what a capture left.

        ``everything``: elsewhere too, for what was just seen to be written by the module's forward.
        """
        for change in self.changes():
            own = not isinstance(change, Drawn) and id(change.live) in self._own
            change.undo(everything=everything or own)
        for live, before in self._tensors:  # of parameters and buffers only which they are, not their contents
            if list(map(id, live.values())) != list(map(id, before.values())):
                live.clear()
                live.update(before)
