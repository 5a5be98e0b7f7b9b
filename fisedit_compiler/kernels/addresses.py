"""Tables of addresses: how a CUDA graph, whose inputs stay where they were, reads other tensors at every replay."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

ALIGNMENT = 16
"""Bytes by which every tensor in a table is aligned, so that kernels may load whole vectors."""
WORD = 2
"""Bytes a staging kernel copies at a time; every dtype of a recording has whole words."""
TARGETS = 16
"""Tensors that one launch of ``CopyOut`` writes to."""


def address_table(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """int64 ``[len(tensors)]`` on ``device``, uploaded without waiting for it.

    The table knows addresses only: the tensors must be kept alive for as long as somebody reads through it.
    """
    return uploaded([tensor.data_ptr() for tensor in tensors], device)


def uploaded(numbers: Sequence[Any], device: torch.device) -> Tensor:
    """Numbers (or lines of them) as int64 on ``device``, without waiting for it."""
    table = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    if device.type != "cuda":
        return table
    # Pinned memory comes from a pool that waits for copies under way before it is used again.
    return table.pin_memory().to(device, non_blocking=True)


def misalignment(tensor: Tensor) -> int:
    """Bytes by which a tensor begins behind an aligned address; 0 for one that is aligned.

    A fake tensor has no address. The memory of a real one would be aligned, as all that torch allocates for a GPU is.
    """
    if isinstance(tensor, FakeTensor):
        return int(tensor.storage_offset()) * tensor.element_size() % ALIGNMENT
    return tensor.data_ptr() % ALIGNMENT


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor can be copied word by word: dense in whatever order of axes, of whole words and aligned."""
    if tensor.nbytes % WORD or misalignment(tensor) or not tensor.numel():
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


@dataclass(frozen=True)
class Runs:
    """A view, by the runs of neighbours that it consists of.

    Attributes:
        starts: where each run begins, in elements from the view's first one.
        length: elements of a run.
        strides: of a dense tensor of the view's shape that has the runs one behind the other.
    """

    starts: tuple[int, ...]
    length: int
    strides: tuple[int, ...]


def runs_of(view: Tensor, most: int = 4096) -> Runs | None:
    """The runs of a view, in the order in which they lie in memory; ``None`` if it has none, repeats, or too many."""
    sizes, strides = view.shape, view.stride()
    axes = sorted((axis for axis in range(view.dim()) if sizes[axis] > 1), key=lambda axis: -strides[axis])
    if not view.numel() or any(strides[axis] == 0 for axis in axes):
        return None
    outer, length = list(axes), 1
    while outer and strides[outer[-1]] == length:
        length *= sizes[outer.pop()]
    if prod(sizes[axis] for axis in outer) > most:
        return None
    if not outer:  # its own strides, also those of axes of one element, which any would do for
        return Runs((0,), length, tuple(strides))
    steps = product(*(range(0, sizes[axis] * strides[axis], strides[axis]) for axis in outer))
    # Axes of one element keep their place, so that what is in the usual order has the usual strides.
    order = list(range(view.dim())) if axes == sorted(axes) else [*axes, *(set(range(view.dim())) - set(axes))]
    dense = [1] * view.dim()
    for behind, axis in zip(reversed(order), reversed(order[:-1]), strict=False):
        dense[axis] = dense[behind] * sizes[behind]
    return Runs(tuple(map(sum, steps)), length, tuple(dense))
