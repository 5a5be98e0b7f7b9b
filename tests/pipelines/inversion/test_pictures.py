"""Whatever a user calls a picture becomes RGB of a fitting size, or is refused with the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fisedit_compiler.errors import ConfigError, PictureError
from fisedit_compiler.pipelines.inversion.pictures import check_encoder, encoded, fit, read_picture, size_unit

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)


def forms(folder: Path) -> dict[str, Any]:
    image = Image.fromarray(PIXELS)
    image.save(folder / "picture.png")
    channels_first = torch.from_numpy(PIXELS).permute(2, 0, 1)
    return {
        "pil": image,
        "opaque": image.convert("RGBA"),
        "path": folder / "picture.png",
        "str": str(folder / "picture.png"),
        "numpy": PIXELS,
        "reversed": PIXELS[::-1, ::-1][::-1, ::-1],
        "float": PIXELS / 255.0,
        "torch": channels_first,
        "batch": channels_first[None],
        "half": (channels_first.double() / 255.0).half(),
        "float torch": channels_first.float() / 255.0,
    }


@pytest.mark.parametrize(
    "form",
    ["pil", "opaque", "path", "str", "numpy", "reversed", "float", "torch", "batch", "half", "float torch"],
)
def test_every_form_gives_the_same_pixels(form: str, tmp_path: Path) -> None:
    picture = read_picture(forms(tmp_path)[form])
    assert picture.mode == "RGB"
    assert np.array_equal(np.asarray(picture), PIXELS)


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA"])
def test_grey_and_palette_become_rgb(mode: str) -> None:
    image = Image.fromarray(PIXELS).convert("L").convert(mode)
    assert np.array_equal(np.asarray(read_picture(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("shape", [(8, 16), (8, 16, 1)])
def test_grey_arrays(shape: tuple[int, ...]) -> None:
    assert np.array_equal(np.asarray(read_picture(PIXELS[..., 0].reshape(shape)))[..., 2], PIXELS[..., 0])


def test_the_users_image_is_not_the_one_returned() -> None:
    image = Image.fromarray(PIXELS)
    picture = read_picture(image)
    image.paste("black", (0, 0, 16, 8))
    assert np.array_equal(np.asarray(picture), PIXELS)


@pytest.mark.parametrize("from_file", [True, False])
def test_orientation_of_a_camera_is_applied(from_file: bool, tmp_path: Path) -> None:
    image = Image.fromarray(PIXELS)
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was held upright: rotate by 90 degrees to see it so
    image.save(tmp_path / "turned.png", exif=exif)
    given = tmp_path / "turned.png" if from_file else Image.open(tmp_path / "turned.png")
    assert np.array_equal(np.asarray(read_picture(given)), np.rot90(PIXELS, -1))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (3, "int"),
        (None, "NoneType"),
        ("no/such/file.png", "no picture"),
        (np.full((4, 4, 3), np.nan), "NaN"),
        (np.full((4, 4, 3), -0.5), r"\(x \+ 1\) / 2"),
        (np.full((4, 4, 3), 200.0), "uint8"),
        (np.zeros((4, 4, 3), dtype=np.int64), "int64"),
        (np.zeros((3, 5, 6), dtype=np.uint8), r"height, width, 3"),
        (np.zeros((0, 4, 3), dtype=np.uint8), "empty"),
        (torch.zeros(5, 6, 3), r"3, height, width"),
        (torch.zeros(2, 3, 4, 4), r"1, 3, height, width"),
        (torch.zeros(3, 4, 4, dtype=torch.int32), "int32"),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 128)), "transparent"),
        (Image.new("F", (4, 4)), "'F'"),
        (Image.new("I;16", (4, 4)), "I;16"),
    ],
)
def test_what_is_no_picture_is_refused(image: Any, message: str) -> None:
    with pytest.raises(PictureError, match=message):
        read_picture(image)


def test_broken_files_are_refused(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "whole.png")
    broken = tmp_path / "broken.png"
    broken.write_bytes((tmp_path / "whole.png").read_bytes()[:-60])
    (tmp_path / "text.png").write_text("no picture")
    for given in (broken, Image.open(broken), tmp_path / "text.png", tmp_path):
        with pytest.raises(PictureError, match="read"):
            read_picture(given)


def test_a_size_that_does_not_fit_names_the_nearest() -> None:
    picture = Image.new("RGB", (100, 64))
    with pytest.raises(PictureError, match=r"100 x 64.*multiples of 32.*96 x 64 or 128 x 64.*resize=True"):
        fit(picture, 32, 64 * 64, resize=False)
    with pytest.raises(PictureError, match=r"nearest are 32 x 32\."):
        fit(Image.new("RGB", (8, 8)), 32, 64 * 64, resize=False)
    assert fit(Image.new("RGB", (96, 256)), 32, 64 * 64, resize=False).size == (96, 256)


@pytest.mark.parametrize(
    ("size", "fitted"),
    [
        ((64, 64), (64, 64)),
        ((32, 64), (32, 64)),  # fits and is not larger than the model's own pictures: left alone
        ((100, 100), (64, 64)),
        ((20, 20), (64, 64)),
        ((400, 100), (128, 32)),
        ((640, 640), (64, 64)),
        ((2000, 10), (192, 32)),
    ],
)
def test_resizing_keeps_the_shape_and_takes_the_models_size(size: tuple[int, int], fitted: tuple[int, int]) -> None:
    assert fit(Image.new("RGB", size), 32, 64 * 64, resize=True).size == fitted


def test_resizing_cuts_the_edges_off_evenly() -> None:
    picture = Image.new("RGB", (192, 64), "red")
    picture.paste("blue", (64, 0, 128, 64))
    cut = np.asarray(fit(picture.crop((0, 0, 191, 64)), 64, 64 * 64, resize=True))
    assert cut.shape == (64, 128, 3)
    assert (cut[32, 64] == (0, 0, 255)).all()


def test_the_unit_is_that_of_pipeline_and_unet(tiny_pipe: Any) -> None:
    assert size_unit(tiny_pipe) == 8
    tiny_pipe.vae_scale_factor = 8
    assert size_unit(tiny_pipe) == 16


def test_latents_are_the_encoders_means(tiny_pipe: Any) -> None:
    picture = Image.fromarray(PIXELS)
    pixels = torch.from_numpy(PIXELS).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        mean = tiny_pipe.vae.encode(pixels).latent_dist.mean
    assert torch.equal(encoded(tiny_pipe, picture), mean * tiny_pipe.vae.config.scaling_factor)


def test_an_encoder_out_of_its_mind_is_noticed(tiny_pipe: Any) -> None:
    with torch.no_grad():
        tiny_pipe.vae.encoder.conv_in.bias.fill_(float("nan"))
    with pytest.raises(PictureError, match="NaN or infinity"):
        encoded(tiny_pipe, Image.fromarray(PIXELS))


def test_a_pipeline_without_encoder_is_refused(tiny_pipe: Any) -> None:
    tiny_pipe.vae.encoder = None
    with pytest.raises(ConfigError, match="encoder"):
        check_encoder(tiny_pipe)
    with pytest.raises(ConfigError, match="encoder"):
        check_encoder(object())
