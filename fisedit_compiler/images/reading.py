"""The one reader: from whatever a user has to an image, an array or a tensor whose values can be looked at."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image

from fisedit_compiler.images.arrays import plain_array, plain_tensor
from fisedit_compiler.images.files import read_file
from fisedit_compiler.images.modes import upright
from fisedit_compiler.images.purpose import Purpose

ImageLike: TypeAlias = torch.Tensor | np.ndarray[Any, Any] | Image.Image | str | os.PathLike[str]
"""What a user may pass: a tensor, an array, a PIL image, or the path of an image or ``.npy`` file."""


def read(source: ImageLike, purpose: Purpose) -> Image.Image | np.ndarray[Any, Any] | torch.Tensor:
    """What ``source`` holds, of any shape, dtype and mode; a file becomes an image or an array.

    An image is decoded and upright (its EXIF orientation is applied), and a copy; so is an array. No more than
    :data:`~fisedit_compiler.images.MAX_PIXELS` pixels are decoded, nothing is unpickled, no other program is run.

    Raises:
        FiseditError: of the purpose's class, whatever is wrong: another type, an unreadable file, too many pixels,
            several frames, values that are masked out or not there.
    """
    if isinstance(source, (str, os.PathLike)):
        with naming(source, purpose):
            held = read_file(source, purpose)
            # Arrays of another byte order or width are brought into shape as any other.
            return plain_array(held, purpose) if isinstance(held, np.ndarray) else held
    if isinstance(source, torch.Tensor):
        return plain_tensor(source, purpose)
    if isinstance(source, Image.Image):
        return upright(source, purpose)
    if isinstance(source, np.ndarray):
        return plain_array(source, purpose)
    raise purpose.error(
        f"a {purpose.noun} cannot be of type {type(source).__name__}; pass a torch tensor, a numpy array, a PIL image "
        "or the path of an image or .npy file"
    )


@contextmanager
def naming(source: object, purpose: Purpose) -> Iterator[None]:
    """Name the file in every error about what it holds, if ``source`` is the path of one."""
    try:
        yield
    except purpose.error as error:
        name = repr(source if isinstance(source, str) else str(source))
        if not isinstance(source, (str, os.PathLike)) or name in str(error):
            raise
        raise purpose.error(f"{purpose.noun} file {name}: {error}") from error
