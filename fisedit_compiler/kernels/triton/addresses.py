"""Addresses of tensors in a table on the device, for kernels that read many tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Addresses:
    """A fixed device table of ``count`` addresses, filled per call without waiting for the device."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.table = torch.empty(count, dtype=torch.int64, device=device)

    def upload(self, tensors: Sequence[Tensor]) -> Tensor:
        """Fill the table with the addresses of ``tensors`` and return it."""
        addresses = torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64)
        if self.table.is_cuda:
            # Pinned memory comes from a pool that waits for copies under way before it is used again.
            self.table.copy_(addresses.pin_memory(), non_blocking=True)
        else:
            self.table.copy_(addresses)
        return self.table
