"""Memory that is a tensor's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def own(value: Tensor, borrowed: Sequence[Tensor]) -> Tensor:
    """A tensor with a storage of exactly its size that nobody else writes to."""
    storage = value.untyped_storage()
    shared = any(storage.data_ptr() == other.untyped_storage().data_ptr() for other in borrowed)
    if shared or storage.nbytes() != value.nbytes:
        return value.clone(memory_format=torch.contiguous_format)
    return value
