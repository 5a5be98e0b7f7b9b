"""Equal pictures are encoded once by runs of the Editor, bit for bit, and again as soon as anything is another."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from fisedit_compiler import Editor, masks
from fisedit_compiler.pipelines import EDITOR_CONFIG
from fisedit_compiler.pipelines.decoding.encodings import KEPT
from fisedit_compiler.pipelines.decoding.vae import SparseVAE
from tests.support.tiny_pipeline import inpaint

PARTS = ("unet", "vae.decoder")
MASK = masks.box_mask(16, 16, (0.2, 0.2, 0.7, 0.7))


def make_vae() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        vae = AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
        )  # fmt: skip
    return vae.eval()


PICTURE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def vae() -> SparseVAE:
    return SparseVAE(make_vae(), EDITOR_CONFIG)


@torch.no_grad()
def encoded(vae: SparseVAE, picture: Tensor = PICTURE) -> Any:
    with vae.record():
        return vae.encode(picture).latent_dist


def test_an_equal_picture_is_encoded_once_with_the_same_bits(vae: SparseVAE) -> None:
    with torch.no_grad():
        own = vae.original.encode(PICTURE).latent_dist
    first, second = encoded(vae), encoded(vae, PICTURE.clone())
    assert vae.encodings.computed == 1
    for found in (first, second):
        assert torch.equal(found.mode(), own.mode()) and found.parameters is not own.parameters
        drawn = [each.sample(torch.Generator().manual_seed(3)) for each in (found, own)]
        assert torch.equal(*drawn)
    first.mode().zero_()
    first.parameters.zero_()
    assert torch.equal(encoded(vae).mode(), own.mode()), "what a pipeline writes to is its own"


def test_without_a_mode_it_is_the_originals(vae: SparseVAE) -> None:
    with torch.no_grad():
        own = vae.original.encode(PICTURE).latent_dist
        assert torch.equal(vae.encode(PICTURE).latent_dist.mode(), own.mode())
        (found,) = vae.encode(PICTURE, return_dict=False)
    assert torch.equal(found.mode(), own.mode()) and vae.encodings.computed == 0


def _write(vae: Any) -> None:
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(1.5)


def _write_unseen(vae: Any) -> None:
    vae.encoder.conv_in.weight.data.mul_(1.5)


def _exchange(vae: Any) -> None:
    vae.quant_conv = torch.nn.Conv2d(8, 8, 1)


def _tile(vae: Any) -> None:
    vae.enable_tiling()


def _slice(vae: Any) -> None:
    vae.enable_slicing()


def _switch(vae: Any) -> None:
    torch.backends.cuda.enable_flash_sdp(not torch.backends.cuda.flash_sdp_enabled())


@pytest.mark.parametrize("change", [_write, _write_unseen, _exchange, _tile, _slice, _switch])
def test_a_vae_that_is_another_encodes_again(change: Callable[[Any], None], vae: SparseVAE) -> None:
    flash = torch.backends.cuda.flash_sdp_enabled()
    try:
        encoded(vae)
        change(vae.original)
        found = encoded(vae)
        with torch.no_grad():
            own = vae.original.encode(PICTURE).latent_dist
        assert vae.encodings.computed == 2 and torch.equal(found.mode(), own.mode())
    finally:
        torch.backends.cuda.enable_flash_sdp(flash)


def test_a_picture_that_lies_otherwise_is_another(vae: SparseVAE) -> None:
    last = PICTURE.to(memory_format=torch.channels_last)
    encoded(vae)
    with torch.no_grad():
        own = vae.original.encode(last).latent_dist.parameters
    for _ in range(2):
        found = encoded(vae, last).parameters
        assert torch.equal(found, own) and found.stride() == own.stride()
    assert vae.encodings.computed == 2


class _ByParts(AutoencoderKL):
    whole: Any

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        if len(x) == 1:
            return super().encode(x, return_dict)
        parts = [self.whole().encode(part, return_dict=False)[0].parameters for part in x.split(1)]
        return (DiagonalGaussianDistribution(torch.cat(parts)),)


def test_a_vae_that_encodes_through_itself_waits_for_nobody() -> None:
    original = make_vae()
    original.__class__ = _ByParts
    vae = SparseVAE(original, EDITOR_CONFIG)
    original.whole = lambda: vae
    found: list[Tensor] = []
    thread = Thread(target=lambda: found.append(encoded(vae, PICTURE.repeat(2, 1, 1, 1)).parameters), daemon=True)
    thread.start()
    thread.join(60)
    assert found and torch.equal(found[0][0], found[0][1])


def test_a_write_in_the_middle_of_a_run_is_seen(vae: SparseVAE) -> None:
    with torch.no_grad(), vae.record():
        vae.encode(PICTURE)
        _write(vae.original)
        found = vae.encode(PICTURE).latent_dist
        assert vae.encodings.computed == 2
        assert torch.equal(found.mode(), vae.original.encode(PICTURE).latent_dist.mode())


@pytest.mark.parametrize(
    "other",
    [
        PICTURE + 1e-7,
        -PICTURE,
        PICTURE.half().float(),
        PICTURE[..., :16],
        PICTURE.repeat(2, 1, 1, 1),
    ],
)
def test_other_pictures_are_others(other: Tensor, vae: SparseVAE) -> None:
    encoded(vae)
    found = encoded(vae, other)
    assert vae.encodings.computed == 2
    with torch.no_grad():
        assert torch.equal(found.mode(), vae.original.encode(other).latent_dist.mode())


def test_few_are_kept(vae: SparseVAE) -> None:
    for number in range(KEPT + 1):
        encoded(vae, PICTURE + number)
    encoded(vae, PICTURE + KEPT)
    encoded(vae, PICTURE + 1)
    assert vae.encodings.computed == KEPT + 1
    encoded(vae, PICTURE)
    assert vae.encodings.computed == KEPT + 2


def _hooked(vae: Any) -> None:
    vae.encoder.register_forward_hook(lambda *_: None)


def _trained(vae: Any) -> None:
    vae.train()


def _replaced(vae: Any) -> None:
    own = vae.encode
    vae.encode = lambda *args, **kwargs: own(*args, **kwargs)


@pytest.mark.parametrize("change", [_hooked, _trained, _replaced])
def test_encoders_that_do_more_than_to_return_are_called_every_time(
    change: Callable[[Any], None], vae: SparseVAE
) -> None:
    change(vae.original)
    found = encoded(vae), encoded(vae)
    with torch.no_grad():
        own = vae.original.encode(PICTURE).latent_dist
    assert all(torch.equal(each.mode(), own.mode()) for each in found) and vae.encodings.computed == 0


def test_gradients_are_not_lost(vae: SparseVAE) -> None:
    picture = PICTURE.clone().requires_grad_()
    with vae.record():
        vae.encode(picture).latent_dist.mode().sum().backward()
    assert picture.grad is not None and picture.grad.abs().sum() > 0


def test_edits_of_inpainting_encode_nothing_and_are_what_they_were() -> None:
    def run(parts: tuple[str, ...]) -> tuple[list[int], list[Tensor]]:
        pipe, options = inpaint(9)
        pipe.set_progress_bar_config(disable=True)
        computed, latents = [], []
        with Editor(pipe, parts=parts) as editor:
            base = editor.generate("a cat", seed=3, num_inference_steps=2, options=options)
            for prompt in ("a dog", "a fox"):
                edit = editor.edit(base, prompt, mask=MASK)
                assert edit.unchanged_outside
                latents.append(edit.latents[-1])
                computed += [pipe.vae.encodings.computed] if type(pipe.vae) is SparseVAE else []
        return computed, latents

    (_, expected), (computed, found) = run(("unet",)), run(PARTS)
    assert computed[0] == computed[1] > 0, "the base's pictures are the edits'"
    assert all(map(torch.equal, found, expected))
