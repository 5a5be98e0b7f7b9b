"""Every form of mask a user may pass, and every way to get it wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fisedit_compiler import masks
from fisedit_compiler.errors import MaskError

H, W, SCALE = 6, 8, 4


def sites() -> torch.Tensor:
    mask = torch.zeros(H, W, dtype=torch.bool)
    mask[1:4, 2:7] = True
    return mask


def grown(mask: torch.Tensor, factor: int = SCALE) -> torch.Tensor:
    return mask.repeat_interleave(factor, 0).repeat_interleave(factor, 1)


def convert(mask: Any, image_scale: int | None = SCALE) -> torch.Tensor:
    return masks.to_site_mask(mask, H, W, image_scale=image_scale)


FORMS = {
    "bool": lambda m: m,
    "uint8": lambda m: m.to(torch.uint8),
    "uint8 grey": lambda m: m.to(torch.uint8) * 255,
    "float": lambda m: m.float(),
    "half": lambda m: m.half(),
    "float64 soft": lambda m: 0.2 + 0.7 * m.double(),
    "[1, H, W]": lambda m: m[None],
    "[1, 1, H, W]": lambda m: m[None, None],
    "strided": lambda m: m.t().contiguous().t(),
    "numpy bool": lambda m: m.numpy(),
    "numpy uint8": lambda m: m.numpy().astype(np.uint8),
    "numpy float": lambda m: m.numpy().astype(np.float64),
    "numpy big-endian": lambda m: m.numpy().astype(">f4"),
    "numpy flipped": lambda m: m.numpy()[::-1].copy()[::-1],
    "PIL 1": lambda m: Image.fromarray(m.numpy()),
    "PIL L": lambda m: Image.fromarray(m.numpy().astype(np.uint8) * 255),
    "PIL RGB": lambda m: Image.fromarray(m.numpy().astype(np.uint8) * 255).convert("RGB"),
    "PIL P": lambda m: Image.fromarray(m.numpy().astype(np.uint8) * 255).convert("P"),
}


@pytest.mark.parametrize("size", ["latent", "image"])
@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, size: str) -> None:
    mask = sites() if size == "latent" else grown(sites())
    converted = convert(FORMS[form](mask))
    assert converted.dtype == torch.bool
    assert converted.is_contiguous()
    assert torch.equal(converted, sites())


@pytest.mark.parametrize("as_text", [True, False])
def test_files(tmp_path: Path, as_text: bool) -> None:
    path = tmp_path / "mask.png"
    Image.fromarray(grown(sites()).numpy().astype(np.uint8) * 255).save(path)
    assert torch.equal(convert(str(path) if as_text else path), sites())


@pytest.mark.parametrize("form", ["numpy bool", "numpy uint8", "numpy float", "numpy big-endian"])
def test_array_files(tmp_path: Path, form: str) -> None:
    path = tmp_path / "mask.NPY"
    with path.open("wb") as file:  # numpy.save appends .npy to names that end otherwise
        np.save(file, FORMS[form](sites()))
    assert torch.equal(convert(path), sites())


def test_array_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(MaskError, match=r"no mask file.*mask\.npy"):
        convert(tmp_path / "mask.npy")
    (tmp_path / "text.npy").write_text("not an array")
    (tmp_path / "empty.npy").touch()
    np.save(tmp_path / "objects.npy", np.array([object()]), allow_pickle=True)
    for name in ("text", "empty", "objects"):
        with pytest.raises(MaskError, match=rf"{name}\.npy.*numpy\.save"):
            convert(tmp_path / f"{name}.npy")
    np.save(tmp_path / "labels.npy", np.ones((H, W), dtype=np.int64))
    with pytest.raises(MaskError, match=r"int64.*mask != 0"):
        convert(tmp_path / "labels.npy")


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_alpha_channel_counts_only_where_it_says_nothing(mode: str) -> None:
    opaque = Image.fromarray(sites().numpy().astype(np.uint8) * 255).convert(mode)
    assert torch.equal(convert(opaque), sites())
    opaque.putpixel((0, 0), (*opaque.getpixel((0, 0))[:-1], 254))
    with pytest.raises(MaskError, match=rf"alpha channel \(mode '{mode}'\).*getchannel"):
        convert(opaque)


@given(st.integers(0, H * SCALE - 1), st.integers(0, W * SCALE - 1))
def test_one_pixel_makes_its_site_active(row: int, column: int) -> None:
    pixels = torch.zeros(H * SCALE, W * SCALE, dtype=torch.bool)
    pixels[row, column] = True
    assert convert(pixels).nonzero().tolist() == [[row // SCALE, column // SCALE]]


@pytest.mark.parametrize("factor", [1, 2, 8])
def test_any_whole_multiple_without_a_scale(factor: int) -> None:
    assert torch.equal(convert(grown(sites(), factor), image_scale=None), sites())


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(H, W, dtype=torch.int64), "int64.*mask != 0"),
        (np.ones((H, W), dtype=np.int32), "int32.*mask != 0"),
        (np.array([["x"]]), "must be bool"),
        (torch.full((H, W), float("nan")), "NaN"),
        (torch.full((H, W), 2.0), r"\[0, 1\].*\[2, 2\]"),
        (torch.full((H, W), -1.0), r"\[0, 1\]"),
        (torch.full((H, W), float("inf")), r"\[0, 1\]"),
        (torch.full((H, W), 3, dtype=torch.uint8), "labels"),
        (torch.ones(2, H, W), r"\[2, 6, 8\]"),
        (torch.ones(H), r"\[6\]"),
        (torch.ones(1, 1, 1, H, W), r"\[1, 1, 1, 6, 8\]"),
        (torch.ones(W, H), "8 x 6.*6 x 8.*24 x 32"),
        (torch.ones(2 * H, 2 * W), "12 x 16.*6 x 8.*24 x 32"),
        (torch.ones(0, 0), "0 x 0"),
        (Image.new("L", (10, 10)), "10 x 10.*6 x 8.*24 x 32"),
        (Image.new("RGBA", (W, H)), "alpha"),
        (Image.new("F", (W, H)), "mode 'F'"),
        ([[1, 0]], "list"),
        (None, "NoneType"),
        ("no-such-file.png", "no-such-file.png"),
    ],
)
def test_mistakes_are_named(mask: Any, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        convert(mask)


@pytest.mark.parametrize("shape", [(H + 1, W + 1), (2 * H, 3 * W), (H, 2 * W), (0, 0)])
def test_sizes_that_are_no_multiple(shape: tuple[int, int]) -> None:
    with pytest.raises(MaskError, match="6 x 8"):
        convert(torch.ones(shape), image_scale=None)


def test_a_file_that_is_no_image(tmp_path: Path) -> None:
    path = tmp_path / "mask.txt"
    path.write_text("not an image")
    with pytest.raises(MaskError, match=r"mask\.txt"):
        convert(path)
    with pytest.raises(MaskError):
        convert(tmp_path)


def test_a_float_of_one_half_is_not_active() -> None:
    values = torch.full((H, W), 0.5)
    values[2, 3] = 0.51
    assert convert(values).nonzero().tolist() == [[2, 3]]
