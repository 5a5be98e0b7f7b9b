"""What holds the slots of a recorded call: the interface, and the stores there are.

Others read through :class:`SlotStore` and have one made by :func:`hold`. A store knows no run. May import what the room
``recordings`` may.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fisedit_compiler.recordings.stores.memory import MemorySlots
from fisedit_compiler.recordings.stores.store import SlotStore

__all__ = ["SlotStore", "hold"]


def hold(slots: Mapping[str, Tensor]) -> SlotStore:
    """Put the slots of a recorded call into a store. The tensors are the store's from now on."""
    return MemorySlots(slots)
