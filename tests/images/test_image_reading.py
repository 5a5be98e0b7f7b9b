"""Masks and pictures are read alike: what is taken, what is refused, and that nothing is read before it is weighed."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torch._subclasses.fake_tensor import FakeTensorMode

from fisedit_compiler.errors import MaskError, PictureError
from fisedit_compiler.images import MAX_PIXELS
from fisedit_compiler.masks import mask_pixels, to_site_mask
from fisedit_compiler.pipelines.inversion.pictures import read_picture

H, W = 6, 8
DRAWN = np.zeros((H, W), dtype=np.uint8)
DRAWN[1:3, 5:] = 255

READERS = pytest.mark.parametrize(
    ("read", "error"), [(mask_pixels, MaskError), (read_picture, PictureError)], ids=["mask", "picture"]
)


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "tiff", "webp"])
def test_mask_and_picture_of_one_photo_agree(orientation: int, kind: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "webp" else {}
    path = saved(tmp_path / f"photo.{kind}", Image.fromarray(DRAWN).convert("RGB"), exif=exif, **options)
    picture = torch.from_numpy(np.array(read_picture(path))[..., 0] > 127)
    assert tuple(picture.shape) == ((H, W) if orientation < 5 else (W, H))
    for given in (path, Image.open(path)):
        assert torch.equal(mask_pixels(given), picture)
        assert torch.equal(to_site_mask(given, *picture.shape), picture)


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "RGBA", "RGBa", "LA", "La", "PA"]
)
def test_modes_of_eight_bits_are_read(mode: str) -> None:
    grey = Image.fromarray(DRAWN)
    image = grey.convert("LA").convert("La") if mode == "La" else grey.convert("RGBA").convert(mode)
    assert np.array_equal(mask_pixels(image).numpy(), DRAWN > 0)
    assert np.array_equal(np.asarray(read_picture(image))[..., 1] > 127, DRAWN > 0)


@READERS
@pytest.mark.parametrize("mode", ["F", "I", "LAB"])
def test_modes_of_unknown_range_are_refused(mode: str, read: Callable[[Any], Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=f"mode '{mode}'.*save it as"):
        read(Image.new(mode, (W, H)))


@pytest.mark.parametrize("white", [1, 65535])
def test_a_mask_of_16_bits_is_cut_at_half_of_them(white: int, tmp_path: Path) -> None:
    path = saved(tmp_path / "deep.png", Image.fromarray((DRAWN > 0).astype(np.uint16) * white))
    assert np.array_equal(mask_pixels(path).numpy(), DRAWN > 0)
    with pytest.raises(PictureError, match=r"deep\.png.*I;16"):
        read_picture(path)
    with pytest.raises(MaskError, match=r"something is painted.*255.*32768"):
        mask_pixels(Image.fromarray(DRAWN.astype(np.uint16)))


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "LA"])
def test_images_of_zeros_and_ones(mode: str) -> None:
    if mode == "P":
        image = Image.fromarray(DRAWN // 255)
        image.putpalette([0, 0, 0, 1, 1, 1])
    else:
        image = Image.fromarray(DRAWN // 255).convert(mode)
    assert np.array_equal(mask_pixels(image).numpy(), DRAWN > 0)


@pytest.mark.parametrize(
    "colour", [(100,) * 3, (127,) * 3, (255, 0, 0), (0, 0, 255), (128, 0, 0), (2, 0, 0), (0, 60, 0)]
)
def test_what_is_painted_and_does_not_count_is_an_error(colour: tuple[int, ...]) -> None:
    image = Image.new("RGB", (W, H))
    image.paste(colour, (2, 2, 5, 5))
    with pytest.raises(MaskError, match=r"painted.*nothing counts|strong colours.*in white \(255\)"):
        mask_pixels(image)
    with pytest.raises(MaskError, match="paint what may change in white"):
        mask_pixels(image.quantize(4))


def test_a_colour_that_does_not_count_beside_white_is_an_error() -> None:
    image = Image.fromarray(DRAWN).convert("RGB")
    image.putpixel((2, 4), (255, 0, 0))
    with pytest.raises(MaskError, match=r"\(255, 0, 0\) at row 4, column 2 \(grey 76, active from 128\).*white"):
        mask_pixels(image)


def test_black_is_empty_and_soft_borders_are_cut() -> None:
    for mode in ("1", "L", "RGB", "CMYK", "P"):
        assert not mask_pixels(Image.new("RGB", (W, H)).convert(mode)).any()
    soft = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert mask_pixels(soft).flatten().tolist() == [value >= 128 for value in range(256)]
    jpeg = io.BytesIO()
    Image.fromarray(DRAWN).resize((64, 48)).convert("RGB").save(jpeg, "JPEG", quality=20)
    assert mask_pixels(Image.open(jpeg)).any()  # what JPEG makes of black and white is no strong colour


@READERS
@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff"])
def test_animated_files_are_refused(
    kind: str, read: Callable[[Any], Any], error: type[Exception], tmp_path: Path
) -> None:
    frames = [Image.new("RGB", (W, H), colour) for colour in ("black", "white")]
    path = saved(tmp_path / f"moving.{kind}", frames[0], save_all=True, append_images=frames[1:])
    with pytest.raises(error, match=rf"moving\.{kind}.*several frames.*image\.seek"):
        read(path)
    chosen = Image.open(path)
    chosen.seek(1)
    assert np.asarray(read(chosen)).all()


def test_the_previews_of_a_phone_photo_are_not_frames(tmp_path: Path) -> None:
    frames = [Image.fromarray(DRAWN).convert("RGB"), Image.new("RGB", (4, 4))]
    path = saved(tmp_path / "photo.jpg", frames[0], format="MPO", save_all=True, append_images=frames[1:], quality=100)
    assert read_picture(path).size == (W, H)
    assert np.array_equal(mask_pixels(path).numpy(), DRAWN > 0)


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header claims a size, and whose pixels are missing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@READERS
@pytest.mark.parametrize("size", [(8192, 8193), (10000, 10000), (30000, 30000), (2**31 - 1, 2**31 - 1)])
@pytest.mark.parametrize("limit", [89478485, None], ids=["Pillow's limit", "no limit of Pillow's"])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused_by_their_header(
    size: tuple[int, int],
    limit: int | None,
    read: Callable[[Any], Any],
    error: type[Exception],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    monkeypatch.setattr(ImageFile.ImageFile, "load_prepare", lambda self: pytest.fail("memory was allocated"))
    (tmp_path / "bomb.png").write_bytes(bomb(*size))
    with pytest.raises(error, match=r"bomb\.png.*pixels.*scale it down"):
        read(tmp_path / "bomb.png")


@READERS
def test_an_opened_bomb_is_refused_before_it_is_decoded(read: Callable[[Any], Any], error: type[Exception]) -> None:
    assert MAX_PIXELS < 8192 * 8193
    with pytest.raises(error, match=r"8193 x 8192 pixels.*scale it down"):
        read(Image.open(io.BytesIO(bomb(8192, 8193))))


def npy(header: str, content: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    line = header.ljust(117).encode() + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H" if version == b"\x01\x00" else "<I", len(line)) + line + content


HUGE = "{'descr': '|b1', 'fortran_order': False, 'shape': (100000000000, 100000000000)}"
LIES = {
    "huge": npy(HUGE),
    "beyond": npy("{'descr': '<f8', 'fortran_order': False, 'shape': (8000, 8000)}", bytes(64)),
    "overflow": npy("{'descr': '<f8', 'fortran_order': False, 'shape': (4294967296, 4294967296)}"),
    "negative": npy("{'descr': '|b1', 'fortran_order': False, 'shape': (-6, -8)}", bytes(48)),
    "short": npy("{'descr': '|b1', 'fortran_order': False, 'shape': (6, 8)}", bytes(47)),
    "long": npy("{'descr': '|b1', 'fortran_order': False, 'shape': (6, 8)}", bytes(49)),
    "objects": npy("{'descr': '|O', 'fortran_order': False, 'shape': (1, 1)}", pickle.dumps([[object]])),
    "nothing wide": npy("{'descr': '|S0', 'fortran_order': False, 'shape': (100000, 100000)}"),
    "records": npy("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1, 1)}", bytes(4)),
    "code": npy("__import__('os').abort()"),
    "deep": npy("(" * 110),
    "version 3": npy("{'descr': '|b1', 'fortran_order': False, 'shape': (1, 1)}", bytes(1), b"\x03\x00"),
    "version 9": npy("{}", b"", b"\x09\x00"),
    "pickle": pickle.dumps(np.ones((H, W))),
    "empty": b"",
}


@READERS
@pytest.mark.parametrize("lie", LIES)
def test_array_files_that_lie(
    lie: str, read: Callable[[Any], Any], error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(np.lib.format, "read_array", lambda *a, **k: pytest.fail("the header was believed"))
    (tmp_path / "array.npy").write_bytes(LIES[lie])
    with pytest.raises(error, match=r"array\.npy.*(numpy\.save|scale it down)"):
        read(tmp_path / "array.npy")


def test_array_files_are_pictures_too(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
    np.save(tmp_path / "picture.npy", values)
    assert np.array_equal(np.asarray(read_picture(tmp_path / "picture.npy")), values)
    np.save(tmp_path / "grey.npy", np.asfortranarray(values[..., 0] / 255.0).astype(">f8"))
    assert np.array_equal(np.asarray(read_picture(tmp_path / "grey.npy"))[..., 0], values[..., 0])


def no_files(folder: Path) -> dict[str, Any]:
    os.mkfifo(folder / "pipe")
    (folder / "folder.png").mkdir()
    (folder / "empty.png").touch()
    (folder / "program.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 6\nshowpage\n")
    with (folder / "large.webp").open("wb") as file:
        file.write(b"RIFF\xff\xff\xff\x7fWEBPVP8 ")
        file.truncate(2**40)  # sparse: it takes no room
    return {
        "missing": folder / "no.png",
        "folder": folder / "folder.png",
        "empty": folder / "empty.png",
        "pipe": folder / "pipe",
        "device": "/dev/zero",
        "program": folder / "program.eps",
        "large": folder / "large.webp",
        "url": "https://example.com/mask.png",
        "data": "data:image/png;base64,AAAA",
        "no name": "",
        "nul": "a\0b.png",
        "surrogate": "\ud800.png",
        "long": "x" * 5000,
        "bytes": os.fsencode(folder / "no.png"),
        "byte path": BytePath(),
    }


class BytePath(os.PathLike[Any]):
    def __fspath__(self) -> bytes:
        return b"mask.png"


@READERS
def test_what_is_no_image_file(read: Callable[[Any], Any], error: type[Exception], tmp_path: Path) -> None:
    for name, given in no_files(tmp_path).items():
        with pytest.raises(error) as caught:
            read(given)
        text = str(caught.value)
        text.encode()  # can be printed
        assert any(word in text for word in ("pass", "check", "save", "scale")), (name, text)


@READERS
def test_arrays_that_are_no_image(read: Callable[[Any], Any], error: type[Exception]) -> None:
    whole = np.ones((H, W), dtype=np.float32)
    with FakeTensorMode():
        fake = torch.ones(1, H, W)
    for given in (
        np.ma.masked_array(whole, mask=DRAWN > 0),
        np.broadcast_to(np.True_, (10**6, 10**6)),
        torch.ones(1).expand(1, 10**6, 10**6),
        whole.astype(complex),
        whole.astype(object),
        whole.astype(str),
        whole.astype("datetime64[s]"),
        np.full((H, W), np.inf),
        np.full((H, W), np.nan, dtype=np.longdouble),
        np.zeros((0, W)),
        torch.ones(1, H, W).to_sparse(),
        torch.ones(1, H, W, device="meta"),
        torch.ones(1, H, W, dtype=torch.complex64),
        torch.quantize_per_tensor(torch.ones(1, H, W), 1.0, 0, torch.quint8),
        torch.full((1, H, W), torch.nan, dtype=torch.bfloat16),
        fake,
        memoryview(whole),
        {"mask": whole},
        3.0,
    ):
        with pytest.raises(error):
            read(given) if read is read_picture else to_site_mask(given, H, W)


def test_masked_arrays_without_masked_elements_and_small_floats_are_taken() -> None:
    assert np.array_equal(mask_pixels(np.ma.masked_array(DRAWN)).numpy(), DRAWN > 0)
    assert np.array_equal(mask_pixels(np.matrix(DRAWN)).numpy(), DRAWN > 0)
    small = torch.from_numpy(DRAWN > 0).float().to(torch.float8_e4m3fn)
    assert np.array_equal(mask_pixels(small).numpy(), DRAWN > 0)


def test_a_colour_image_of_zeros_and_ones_is_taken_as_such() -> None:
    values = np.zeros((H, W, 3), dtype=np.uint8)
    values[1, 2] = 0, 0, 1
    values[3, 4] = 1, 1, 1
    assert mask_pixels(Image.fromarray(values)).nonzero().tolist() == [[1, 2], [3, 4]]
