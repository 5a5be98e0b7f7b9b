"""Contents of parameters and buffers as a key that tells a permutation, a changed sign and a single element apart.

Versions and addresses tell for nothing that a tensor was exchanged or written to by an ordinary operation. What is
written through ``.data``, numpy or dlpack leaves both alone, so a cheap digest of all contents is compared as well. On
a CUDA device it is exact (``kernels/triton/checksums.py``, one pass over memory). On a CPU it is a product with a fixed
random vector, and contents are read for good only where one of the three moved.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from operator import is_

import torch
from torch import Tensor, nn

from fisedit_compiler.capture.keys.watch import Stamps, stamps

_WIDTH = 1024
_EXACT_BELOW = 1 << 14
"""Bytes below which a tensor is simply read."""


class Weights:
    """The contents of one module's parameters and buffers, digested again only where they may have changed."""

    def __init__(self) -> None:
        self._source: Mapping[str, Tensor] = {}
        self._tensors: list[Tensor] = []
        self._stamps: Stamps = ([], [])
        self._look: Callable[[], Tensor] | None = None
        self._glance: Tensor | None = None
        self._on_meta = False
        self._key = ""
        self.moves = 0
        """How often a version or an address was seen to have changed."""

    def key(self, tensors: Mapping[str, Tensor]) -> str:
        """Digest of the contents of all tensors, whose names and forms are the structure's business; empty on meta.

        Args:
            tensors: by path. The mapping that was passed last is taken to hold the same ones still.
        """
        same = tensors is self._source
        if not same:
            plain = [part for tensor in tensors.values() for part in plain_parts(tensor)]
            same = len(plain) == len(self._tensors) and all(map(is_, plain, self._tensors))
            # What a wrapper is made of may be exchanged inside it, so it is asked every time.
            self._source = tensors if len(plain) == len(tensors) and all(map(is_, plain, tensors.values())) else {}
            self._tensors = plain
            self._on_meta = any(tensor.is_meta for tensor in plain)
        if self._on_meta:
            return ""
        now = stamps(self._tensors)
        if not (same := same and now == self._stamps):
            self.moves += 1
        with torch.no_grad():
            # Where the tensors lie is prepared once for all looks at them.
            if not same or self._look is None:
                self._look = _looking(self._tensors)
            glance = self._look()
            if not same or self._glance is None or not torch.equal(glance, self._glance):
                self._key = _digest(self._tensors, glance)
                self._stamps, self._glance = now, glance
        return self._key

    def moved(self) -> bool:
        """Whether a version or an address changed since :meth:`key` (microseconds; contents are not looked at)."""
        return stamps(self._tensors) != self._stamps


def plain_parts(tensor: Tensor) -> list[Tensor]:
    """A tensor as ordinary ones: those that a quantized or otherwise wrapped tensor is made of."""
    if type(tensor) in (Tensor, nn.Parameter, nn.Buffer) or not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in plain_parts(getattr(tensor, name))]


def _looking(tensors: list[Tensor]) -> Callable[[], Tensor]:
    """What reads the contents of tensors: one tensor on the host (int64) that changes if they do.

    Serves as long as the tensors stay where they are.
    """
    exact = [tensor for tensor in tensors if tensor.is_cuda]
    others = [tensor for tensor in tensors if not tensor.is_cuda]
    on_cuda = _exact_on_cuda(exact) if exact else None

    def look() -> Tensor:
        parts = [] if on_cuda is None else [on_cuda()]
        if others:
            products = torch.tensor([_product(tensor) for tensor in others], dtype=torch.float64, device="cpu")
            parts.append(products.view(torch.int64))
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device="cpu")

    return look


def _product(tensor: Tensor) -> float:
    """A weighted sum of the elements; small tensors and those of whole numbers by their CRC."""
    if not tensor.is_floating_point() or tensor.nbytes < _EXACT_BELOW or tensor.device.type != "cpu":
        return float(_crc(tensor))
    flat = _flat(tensor)
    if flat.element_size() == 1:
        return float(_crc(tensor))
    rows = flat[: flat.numel() // _WIDTH * _WIDTH].view(-1, _WIDTH)
    vector = _vector(_WIDTH, tensor.dtype)
    sums = (rows @ vector).double()
    tail = flat[rows.numel() :]
    total = torch.dot(sums, _vector(len(sums), torch.float64))
    return float(total + torch.dot(tail.double(), _vector(_WIDTH, torch.float64)[: len(tail)]))


@lru_cache(maxsize=64)
def _vector(length: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(length)
    return (torch.rand(length, generator=generator, dtype=torch.float64, device="cpu") + 0.5).to(dtype)


def _digest(tensors: list[Tensor], glance: Tensor) -> str:
    digest = hashlib.sha256()
    position = 0
    for tensor in tensors:
        if tensor.is_cuda:
            digest.update(f"{int(glance[position])}:{_order(tensor)},".encode())
            position += 1
        else:
            digest.update(f"{_crc(tensor)}:{_order(tensor)},".encode())
    return digest.hexdigest()


def _crc(tensor: Tensor) -> int:
    flat = _flat(tensor)
    if flat.device.type != "cpu":
        flat = flat.cpu()
    return zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0


def _order(tensor: Tensor) -> str:
    """How the elements lie in memory, for tensors that are not contiguous."""
    return "" if tensor.layout is not torch.strided or tensor.is_contiguous() else str(tensor.stride())


def _flat(tensor: Tensor) -> Tensor:
    """All elements in the order of memory, without a copy where they are dense."""
    tensor = tensor.detach()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_contiguous():
        return tensor.reshape(-1)
    order = sorted(range(tensor.dim()), key=lambda axis: tensor.stride(axis), reverse=True)
    return tensor.permute(order).reshape(-1)


def _exact_on_cuda(tensors: list[Tensor]) -> Callable[[], Tensor]:
    try:
        from fisedit_compiler.kernels.triton.checksums import Checksums
    except ImportError:  # no Triton: every tensor is read by the host
        return lambda: torch.tensor([_crc(tensor) for tensor in tensors], dtype=torch.int64, device="cpu")
    flat = [_flat(tensor) for tensor in tensors]
    if any(part.data_ptr() != tensor.data_ptr() for part, tensor in zip(flat, tensors, strict=True)):
        return lambda: Checksums([_flat(tensor) for tensor in tensors])().cpu()  # some are copies made for reading
    prepared = Checksums(flat)
    return lambda: prepared().cpu()
