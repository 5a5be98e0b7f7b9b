"""Small files of every format and mode that Pillow writes, and what damage does to them; the same ones every time."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator

import numpy as np
from PIL import Image

SIZE = (16, 12)
_WRITTEN = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "MPO": ("RGB",),
    "GIF": ("P",),
    "WEBP": ("RGB", "RGBA"),
    "AVIF": ("RGB",),
    "TIFF": ("1", "L", "P", "RGB", "RGBA", "CMYK", "LAB", "F", "I;16"),
    "BMP": ("L", "RGB"),
    "DIB": ("RGB",),
    "PPM": ("1", "L", "RGB"),
    "TGA": ("L", "RGB", "RGBA"),
    "PCX": ("P", "RGB"),
    "SGI": ("RGB",),
    "JPEG2000": ("L", "RGB"),
    "QOI": ("RGB",),
    "ICO": ("RGBA",),  # from here on formats that are not read
    "DDS": ("RGB",),
    "EPS": ("RGB",),
    "PDF": ("RGB",),
    "XBM": ("1",),
}
_ANIMATED = ("GIF", "PNG", "WEBP", "TIFF", "AVIF")


def image(mode: str) -> Image.Image:
    """Grey noise of every value, of ``SIZE``."""
    values = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 1), dtype=np.uint8).repeat(3, axis=2)
    if mode in {"F", "I;16"}:
        return Image.fromarray(values[..., 0].astype("float32" if mode == "F" else "uint16"))
    if mode == "LAB":
        return Image.frombytes("LAB", SIZE, values.tobytes())
    return Image.fromarray(values).convert(mode)


def file_of(file_format: str, mode: str, **options: object) -> bytes:
    """The bytes of one such file."""
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    with_exif = {"exif": exif} if file_format in {"PNG", "JPEG", "WEBP"} else {}
    image(mode).save(buffer, file_format, **with_exif, **options)
    return buffer.getvalue()


def seeds() -> dict[str, bytes]:
    """The whole files, by a name with the suffix of their kind."""
    Image.init()
    found = {}
    for file_format, modes in _WRITTEN.items():
        for mode in modes:
            if file_format.upper() in Image.SAVE:
                found[f"{mode.replace(';', '')}.{file_format.lower()}"] = file_of(file_format, mode)
    for file_format in _ANIMATED:
        frames = {"save_all": True, "append_images": [image("RGB").rotate(90)]}
        if file_format in Image.SAVE:
            found[f"moving.{file_format.lower()}"] = file_of(file_format, "RGB", **frames)
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg"):
        found[f"{compression}.tiff"] = file_of("TIFF", "RGB", compression=compression)
    for dtype in ("bool", "uint8", "float32", "float64", ">f2", "complex64"):
        buffer = io.BytesIO()
        np.save(buffer, (np.arange(192).reshape(12, 16) % 2).astype(dtype))
        found[f"{dtype.strip('>')}.npy"] = buffer.getvalue()
    return found


def damaged(whole: bytes, count: int, seed: str) -> Iterator[bytes]:
    """``count`` ways to spoil a file: flipped bits, cut ends, bytes of the header set, parts repeated or left out."""
    chance = random.Random(seed)
    for number in range(count):
        spoilt = bytearray(whole)
        place = chance.randrange(len(spoilt))
        header = chance.randrange(min(len(spoilt), 64))
        match number % 6:
            case 0:
                spoilt[place] ^= 1 << chance.randrange(8)
            case 1:
                del spoilt[place:]
            case 2:
                spoilt[header] = chance.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 3:
                spoilt[header : header + 4] = chance.randbytes(4)
            case 4:
                spoilt[place:place] = spoilt[place : place + chance.randrange(1, 32)]
            case 5:
                del spoilt[place : place + chance.randrange(1, 16)]
        yield bytes(spoilt)
