"""Arrays and tensors that may be an image, and ``.npy`` files, whose headers are not believed."""

from __future__ import annotations

import math
import os
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.lib import format as npy

from fisedit_compiler.images.purpose import Purpose

_NUMBERS = "biufc"  # kinds of dtypes; what is none of them (objects, text, records) is never read from a file
_SAVE_AGAIN = "write it by numpy.save as bool, uint8 or float"


def plain_array(array: np.ndarray[Any, Any], purpose: Purpose) -> np.ndarray[Any, Any]:
    """A contiguous copy in the machine's byte order, its shape and dtype untouched; floats at most 64 bits wide.

    Arrays that hold no numbers are returned as they are, for the caller to refuse by their dtype.

    Raises:
        FiseditError: elements are masked out (``numpy.ma``), or there are too many.
    """
    if isinstance(array, np.ma.MaskedArray) and np.ma.is_masked(array):
        raise purpose.error(
            f"the {purpose.noun} is a numpy.ma array of which elements are masked out, so their values are not known; "
            "pass array.filled(0), or another value for them"
        )
    purpose.check_size(array.shape)  # before the copy: a broadcast view may be of any size
    plain = np.asarray(array)
    if plain.dtype.kind not in _NUMBERS:
        return plain
    dtype = np.dtype(np.float64) if plain.dtype.kind == "f" and plain.dtype.itemsize > 8 else plain.dtype
    with purpose.guard(f"pass an array {purpose.arrays}"):
        return np.array(plain, dtype=dtype.newbyteorder("="), order="C")


def plain_tensor(tensor: torch.Tensor, purpose: Purpose) -> torch.Tensor:
    """The tensor detached, if its values can be looked at; floats of 8 bits are widened.

    Raises:
        FiseditError: it is sparse, quantized, nested or without values, or has too many.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    if tensor.is_quantized or tensor.layout != torch.strided or tensor.is_nested:
        raise purpose.error(
            f"the {purpose.noun} is a sparse, nested or quantized tensor; pass tensor.to_dense() or tensor.dequantize()"
        )
    if tensor.is_meta or isinstance(tensor, FakeTensor):
        raise purpose.error(f"the {purpose.noun} is a tensor without values (meta or fake); pass a real one")
    purpose.check_size(tensor.shape)
    plain = tensor.detach()
    return plain.float() if plain.is_floating_point() and plain.itemsize == 1 else plain


def read_npy(file: BinaryIO, purpose: Purpose) -> np.ndarray[Any, Any]:
    """The array of an open ``.npy`` file, from its beginning.

    The header says shape and dtype; both are held against the size of the file before anything is allocated, and what
    is no array of numbers is refused, so that nothing is ever unpickled.

    Raises:
        FiseditError: it is no such file, a damaged one, or holds something else than numbers.
    """
    with purpose.guard(f"it is not an array file; {_SAVE_AGAIN}"):
        version = npy.read_magic(file)
        if version not in ((1, 0), (2, 0)):  # 3.0 is for records with names outside latin-1
            raise purpose.error(f"the {purpose.noun} is an array file of format {version}; {_SAVE_AGAIN}")
        header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = header(file)
        if dtype.kind not in _NUMBERS:
            raise purpose.error(f"the {purpose.noun} is an array file of {dtype}, no numbers; {_SAVE_AGAIN}")
        purpose.check_size(shape)
        claimed = math.prod(shape) * dtype.itemsize
        held = os.fstat(file.fileno()).st_size - file.tell()
        if min(shape, default=0) < 0 or claimed != held:
            raise purpose.error(
                f"the {purpose.noun} is an array file that claims the shape {list(shape)} of {dtype}, {claimed} bytes, "
                f"but holds {held}; it is damaged: {_SAVE_AGAIN}"
            )
        file.seek(0)
        return np.asarray(npy.read_array(file, allow_pickle=False))
