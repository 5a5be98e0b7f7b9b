"""Tables of addresses: how a CUDA graph, whose inputs stay where they were, reads other tensors at every replay."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes by which every tensor in a table is aligned, so that kernels may load whole vectors."""
WORD = 2
"""Bytes a staging kernel copies at a time; every dtype of a recording has whole words."""


def address_table(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """int64 ``[len(tensors)]`` on ``device``, uploaded without waiting for it.

    The table knows addresses only: the tensors must be kept alive for as long as somebody reads through it.
    """
    addresses = torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64, device="cpu")
    if device.type != "cuda":
        return addresses
    # Pinned memory comes from a pool that waits for copies under way before it is used again.
    return addresses.pin_memory().to(device, non_blocking=True)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor can be copied word by word: dense in whatever order of axes, of whole words and aligned."""
    if tensor.nbytes % WORD or tensor.data_ptr() % ALIGNMENT or not tensor.numel():
        return False
    axes = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    expected = 1
    for stride, size in axes:
        if stride != expected:
            return False
        expected *= size
    return True


def tensor_at(address: int, like: Tensor) -> Tensor:
    """The CPU tensor at an address, with shape, strides and dtype of ``like``. The memory stays its owner's."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
    buffer = (ctypes.c_byte * (extent * like.element_size())).from_address(address)
    return torch.frombuffer(buffer, dtype=like.dtype).as_strided(like.shape, like.stride())
