"""Opening an image or ``.npy`` file that may come from anywhere."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from PIL import Image

from fisedit_compiler.images.arrays import read_npy
from fisedit_compiler.images.modes import upright
from fisedit_compiler.images.purpose import MAX_PIXELS, Purpose

FORMATS = (
    *("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "GIF", "BMP", "DIB", "JPEG2000", "MPO", "PCX", "PPM", "PSD", "QOI", "SGI"),
    "TGA",
)
"""Pillow's names of the formats that are read. Others run programs (EPS), hold icons of several sizes, or are rare."""

_MAX_BYTES = 8 * MAX_PIXELS + 2**20  # eight bytes a pixel: uncompressed RGBA of 16 bits, or float64
_FIRST_IS_WHOLE = frozenset({"MPO", "PSD"})  # what follows are previews, depth maps or layers
_URL = re.compile(r"data:|[A-Za-z][A-Za-z0-9+.-]+://")


def read_file(path: str | os.PathLike[str], purpose: Purpose) -> Image.Image | np.ndarray[Any, Any]:
    """The image of a file, upright and decoded, or the array of a ``.npy`` file; see :func:`upright`, ``read_npy``.

    Raises:
        FiseditError: there is no such file, it is none of a known format, animated, damaged or too large.
    """
    with purpose.guard("check the path, and save it as PNG"):
        name = os.fspath(path)
        if not isinstance(name, str):
            raise purpose.error(f"the path of the {purpose.noun} is of {type(name).__name__}; pass a str")
        if _URL.match(name):
            raise purpose.error(
                f"the {purpose.noun} {name[:80]!r} is an address; download it and pass the path of the file"
            )
        _check_file(Path(name), purpose)
        with open(name, "rb") as file:
            magic = file.read(len(npy.MAGIC_PREFIX))
            file.seek(0)
            if magic == npy.MAGIC_PREFIX or name.lower().endswith(".npy"):
                return read_npy(file, purpose)
            return _read_image(file, purpose)


def _check_file(path: Path, purpose: Purpose) -> None:
    """Refuse what is no regular file; opening a pipe would wait for ever, and a device may never end."""
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise purpose.error(f"there is no {purpose.noun} file {str(path)!r}; check the path") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "folder" if stat.S_ISDIR(status.st_mode) else "device, pipe or socket"
        raise purpose.error(f"the {purpose.noun} {str(path)!r} cannot be read: it is a {kind}; pass an image file")
    if status.st_size == 0:
        raise purpose.error(
            f"the {purpose.noun} file {str(path)!r} cannot be read: it is empty; save it again, as PNG or by numpy.save"
        )
    if status.st_size > _MAX_BYTES:
        raise purpose.error(
            f"the {purpose.noun} file {str(path)!r} has {status.st_size} bytes, more than the {_MAX_BYTES} that are "
            "read; scale the picture down and save it as PNG"
        )


def _read_image(file: BinaryIO, purpose: Purpose) -> Image.Image:
    Image.init()
    try:
        opened = Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
    except Image.DecompressionBombError as error:
        raise purpose.error(f"the {purpose.noun} has too many pixels ({error}); scale it down first") from error
    except Image.UnidentifiedImageError as error:
        raise purpose.error(
            f"the {purpose.noun} cannot be read: it is not an image of a known format ({', '.join(FORMATS)}), or its "
            "beginning is damaged; save it as PNG"
        ) from error
    with opened:
        purpose.check_size((opened.height, opened.width))  # before looking for frames, which may decode them
        if opened.format not in _FIRST_IS_WHOLE and getattr(opened, "is_animated", False):
            raise purpose.error(
                f"the {purpose.noun} is a {opened.format} file of several frames or pages, and it is not known which "
                "is meant; save one of them as PNG, or open it with PIL, image.seek(n), and pass the image"
            )
        return upright(opened, purpose)
