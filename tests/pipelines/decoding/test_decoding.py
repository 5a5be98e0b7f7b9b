"""A VAE decodes edits inside their masks and a border; outside, every pixel is the base's, whatever is switched on."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from fisedit_compiler import SparsifyConfig
from fisedit_compiler.errors import CaptureError, ModeError
from fisedit_compiler.kernels.tolerances import assert_close
from fisedit_compiler.pipelines import EDITOR_CONFIG
from fisedit_compiler.pipelines.decoding import decoder, runs
from fisedit_compiler.pipelines.decoding.decoder import BORDER, Decoding, as_pixels, bordered
from fisedit_compiler.pipelines.decoding.runs import Decoded, DecodeEdit
from fisedit_compiler.pipelines.decoding.vae import SparseVAE
from tests.reference.pinned import PinnedRun
from tests.support.compiled_zoo import active_sets

CONFIG = SparsifyConfig(dense_above=1.0, cache=False)
HEIGHT, WIDTH, SCALE = 27, 31, 4


def make_vae() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=4,
            norm_num_groups=4,
        )
    return vae.eval()


def box(top: int, left: int, bottom: int, right: int) -> Tensor:
    mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


BASE = torch.randn(1, 4, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))
NEW = torch.randn(1, 4, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(2))
MIDDLE = box(10, 12, 15, 17)
MASKS = {
    "middle": MIDDLE,
    "corner": box(0, 0, 4, 3),
    "last corner": box(HEIGHT - 3, WIDTH - 2, HEIGHT, WIDTH),
    "edge": box(9, WIDTH - 1, 12, WIDTH),
    "two regions": box(0, 0, 2, 2) | box(24, 25, 26, 28),
    "one site": box(13, 14, 14, 15),
}


@pytest.fixture(scope="module")
def vae() -> SparseVAE:
    return SparseVAE(make_vae(), CONFIG)


@pytest.fixture(autouse=True)
def plain(vae: SparseVAE) -> Iterator[None]:
    yield
    vae.disable_tiling()
    vae.disable_slicing()
    assert not vae.refused


def recorded(vae: Any, latents: Tensor = BASE) -> Decoded:
    with torch.no_grad(), vae.record() as decoded:
        pixels = vae.decode(latents, return_dict=False)[0]
        assert torch.equal(pixels, vae.original.decode(latents).sample), "recording changes nothing"
    assert decoded.recording is None, "the first edit makes it"
    return decoded


def edited(
    vae: Any, base: Decoded, mask: Any, new: Tensor = NEW, *, record: bool = False, copies: int = 1
) -> tuple[Tensor, DecodeEdit]:
    """Decode the base's latents with ``new`` ones inside the masks."""
    assert base.latents is not None
    each = mask if isinstance(mask, list) else [mask] * copies
    latents = torch.cat([torch.where(one, new, base.latents) for one in each])
    with torch.no_grad(), vae.edit(base, mask, record=record, copies=copies) as session:
        pixels = vae.decode(latents).sample
    return pixels, session


def check_outside(pixels: Tensor, base: Decoded, mask: Tensor, session: DecodeEdit, copy: int = 0) -> None:
    inside = as_pixels(bordered(mask), SCALE)
    assert session.decodes[copy].pixels is not None and torch.equal(session.decodes[copy].pixels, inside)
    assert base.pixels is not None and 0 < inside.sum() < inside.numel()
    assert torch.equal(pixels[..., ~inside], base.pixels[..., ~inside])
    changed = as_pixels(mask, SCALE)
    assert not torch.equal(pixels[..., changed], base.pixels[..., changed])


@pytest.mark.parametrize("name", MASKS)
def test_pixels_outside_the_border_are_the_bases(name: str, vae: SparseVAE) -> None:
    base = recorded(vae)
    pixels, session = edited(vae, base, MASKS[name])
    check_outside(pixels, base, MASKS[name], session)
    assert session.decodes[0].kind == "sparse" and session.decodes[0].seconds > 0 and not session.decodes[0].note


@pytest.mark.parametrize("size", [(8, 8), (16, 9), (HEIGHT, WIDTH)])
def test_any_size(size: tuple[int, int], vae: SparseVAE) -> None:
    base = recorded(vae, BASE[..., : size[0], : size[1]])
    mask = torch.zeros(size, dtype=torch.bool)
    mask[0, 0] = True
    pixels, session = edited(vae, base, mask, NEW[..., : size[0], : size[1]])
    if bordered(mask).all():
        assert session.decodes[0].pixels is not None and session.decodes[0].pixels.all()
    else:
        check_outside(pixels, base, mask, session)


def test_packed_is_the_pinned_program(vae: SparseVAE) -> None:
    base = recorded(vae)
    pixels, _ = edited(vae, base, MIDDLE)
    latents = torch.where(MIDDLE, NEW, BASE)
    with vae.decoding.edit(base.recording, bordered(MIDDLE)) as session:
        assert torch.equal(vae.decoding(latents), pixels)
    oracle = PinnedRun(Decoding(vae.original), {"latents": BASE})
    assert base.pixels is not None and torch.equal(oracle.base_output, base.pixels)
    pinned = oracle.replay({"latents": latents}, active_sets(session), norm="recorded", attention="cached")
    assert_close(pixels, pinned, torch.float32)


def test_the_step_over_the_border_is_small(vae: SparseVAE) -> None:
    """Where the edit meets the base, it has nearly faded: less than without a border by far."""

    def step(sites: Tensor) -> float:
        with torch.no_grad(), vae.decoding.edit(base.recording, sites):
            pixels = vae.decoding(torch.where(MIDDLE, NEW, BASE))
        inside = as_pixels(sites, SCALE)
        inner = inside & ~as_pixels(~sites, SCALE).float().eq(1)
        rim = inner & torch.nn.functional.max_pool2d((~inside)[None].float(), 3, 1, 1)[0].bool()
        assert base.pixels is not None
        return float((pixels - base.pixels)[..., rim].abs().mean())

    base = recorded(vae)
    edited(vae, base, MIDDLE)
    assert step(bordered(MIDDLE)) < 0.05 * step(MIDDLE)


@pytest.mark.parametrize("threads", [1, 2])
def test_copies_and_edits_of_edits(threads: int, vae: SparseVAE) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        base = recorded(vae)
        masks = [MASKS["corner"], MASKS["last corner"], torch.zeros_like(MIDDLE)]
        pixels, session = edited(vae, base, masks, record=True, copies=3)
        for copy, mask in enumerate(masks[:2]):
            check_outside(pixels[copy : copy + 1], base, mask, session, copy)
            alone, _ = edited(vae, base, mask)
            assert torch.equal(alone, pixels[copy : copy + 1]), "no copy sees another's mask"
        assert base.pixels is not None and torch.equal(pixels[2:], base.pixels)
        assert [one.kind for one in session.decodes] == ["sparse", "sparse", "skipped"]
        first = session.results[0]
        assert base.recording is not None and base.num_calls == 1 and base.nbytes == base.own_nbytes
        assert first.recording is not None and first.complete and 0 < first.own_nbytes < first.nbytes
        again, turn = edited(vae, first, MIDDLE, -NEW, record=True)
        check_outside(again, first, MIDDLE, turn)
        assert session.results[2] is base
    finally:
        torch.set_num_threads(before)


def test_pictures_of_one_run_are_decoded_together(vae: SparseVAE) -> None:
    base = recorded(vae, torch.cat([BASE, -BASE]))
    pixels, session = edited(vae, base, MIDDLE, torch.cat([NEW, -NEW]))
    check_outside(pixels, base, MIDDLE, session)
    vae.enable_slicing()
    pixels, session = edited(vae, base, MIDDLE, torch.cat([NEW, -NEW]))
    check_outside(pixels, base, MIDDLE, session)
    assert session.decodes[0].kind == "dense" and "slicing is on" in session.decodes[0].note


def test_slicing_and_large_tiles_change_nothing_for_one_picture(
    vae: SparseVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vae.original, "tile_latent_min_size", WIDTH)
    base = recorded(vae)
    plainly, _ = edited(vae, base, MIDDLE)
    vae.enable_slicing()
    vae.enable_tiling()
    assert vae.original.use_tiling and vae.original.use_slicing
    pixels, session = edited(vae, base, [MIDDLE, MASKS["corner"]], copies=2)
    assert torch.equal(pixels[:1], plainly) and [one.kind for one in session.decodes] == ["sparse", "sparse"]


@contextmanager
def tiles(vae: SparseVAE) -> Iterator[None]:
    """Tiles that are smaller than the picture."""
    vae.enable_tiling()
    limits = vae.tile_latent_min_size, vae.tile_sample_min_size
    vae.tile_latent_min_size, vae.tile_sample_min_size = 16, 16 * SCALE
    yield
    vae.tile_latent_min_size, vae.tile_sample_min_size = limits


@pytest.mark.parametrize("when", ["both", "the edit", "the base"])
def test_tiles_are_decoded_densely_and_keep_the_outside(when: str, vae: SparseVAE) -> None:
    with tiles(vae):
        tiled = recorded(vae)
        assert tiled.recording is None and "tiling is on" in tiled.note
    base = recorded(vae) if when == "the edit" else tiled
    if when == "the base":
        vae.disable_tiling()
        pixels, session = edited(vae, base, MIDDLE)
    else:
        with tiles(vae):
            pixels, session = edited(vae, base, MIDDLE)
    check_outside(pixels, base, MIDDLE, session)
    assert session.decodes[0].kind == "dense" and "tiling is on" in session.decodes[0].note


@pytest.mark.parametrize("forced", [True, False], ids=["widened", "half"])
def test_a_vae_that_pipelines_widen_for_every_decode(forced: bool) -> None:
    original = make_vae().to(torch.float16)
    original.register_to_config(force_upcast=forced)
    vae: Any = SparseVAE(original, CONFIG)

    @contextmanager
    def widened() -> Iterator[torch.dtype]:
        if forced:
            vae.to(dtype=torch.float32)
        yield next(iter(vae.post_quant_conv.parameters())).dtype
        vae.to(dtype=torch.float16)

    with widened() as dtype:
        base = recorded(vae, BASE.to(dtype))
    assert vae.dtype == torch.float16 and base.pixels is not None and base.pixels.dtype == dtype
    for mask in (MIDDLE, MASKS["corner"]):
        with widened() as dtype:
            pixels, session = edited(vae, base, mask, NEW.to(dtype), record=True)
        assert session.decodes[0].kind == "sparse", session.decodes[0].note
        check_outside(pixels, base, mask, session)


def test_masks_that_leave_nothing_outside_or_inside(vae: SparseVAE) -> None:
    base = recorded(vae)
    full, session = edited(vae, base, torch.ones_like(MIDDLE))
    with torch.no_grad():
        assert torch.equal(full, vae.original.decode(NEW).sample), "a full mask is the dense decode"
    assert session.decodes[0].pixels is None
    none, session = edited(vae, base, torch.zeros_like(MIDDLE))
    assert base.pixels is not None and torch.equal(none, base.pixels) and session.decodes[0].kind == "skipped"
    with torch.no_grad(), vae.edit(base, None, record=True) as session:
        whole = vae.decode(NEW).sample
    assert torch.equal(whole, full)
    (found,) = session.results
    pixels, session = edited(vae, found, MIDDLE, BASE)
    check_outside(pixels, found, MIDDLE, session)
    assert session.decodes[0].kind == "sparse"


def test_above_the_break_even_it_is_dense_inside(vae: SparseVAE) -> None:
    careful = SparseVAE(vae.original, SparsifyConfig(dense_above=0.01, cache=False))
    base = recorded(careful)
    pixels, session = edited(careful, base, MIDDLE, record=True)
    check_outside(pixels, base, MIDDLE, session)
    assert session.decodes[0].kind == "dense" and "above SparsifyConfig.dense_above" in session.decodes[0].note
    assert session.results[0].recording is not None


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda latents: latents + 1.0, "the latents outside the mask are not the base's"),
        (lambda latents: latents.double(), "another size or dtype"),
    ],
)
def test_what_does_not_follow_the_base_is_decoded_whole(
    spoil: Callable[[Tensor], Tensor], why: str, vae: SparseVAE
) -> None:
    base = recorded(vae)
    if "dtype" in why:
        base.latents = spoil(BASE)
    latents = torch.where(MIDDLE, NEW, BASE) if "dtype" in why else spoil(BASE)
    with torch.no_grad(), vae.edit(base, MIDDLE) as session:
        pixels = vae.decode(latents).sample
        assert torch.equal(pixels, vae.original.decode(latents).sample)
    assert why in session.decodes[0].note and session.decodes[0].pixels is None


def test_other_weights_than_the_bases_are_not_mixed() -> None:
    vae: Any = SparseVAE(make_vae(), CONFIG)
    base = recorded(vae)
    with torch.no_grad():
        vae.decoder.conv_out.bias.add_(0.5)
    pixels, session = edited(vae, base, MIDDLE)
    with torch.no_grad():
        assert torch.equal(pixels, vae.original.decode(torch.where(MIDDLE, NEW, BASE)).sample)
    assert session.decodes[0].pixels is None and "it was changed since" in session.decodes[0].note


def test_a_recording_that_is_too_large_is_not_made(vae: SparseVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "free_memory", lambda device: 1 << 20)
    base = recorded(vae)
    pixels, session = edited(vae, base, MIDDLE)
    check_outside(pixels, base, MIDDLE, session)
    assert base.recording is None and "more than half of the 0.0 GiB that are free" in session.decodes[0].note
    assert (decoder.free_memory(torch.device("cpu")) or 1) > 0 and decoder.free_memory(torch.device("meta")) != 0


def test_a_decoder_that_fails_goes_on_densely_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    vae: Any = SparseVAE(make_vae(), CONFIG)

    def refusing(*_: Any, **__: Any) -> Any:
        raise CaptureError("it does something odd")

    monkeypatch.setattr(vae.decoding, "record", refusing)
    with caplog.at_level(logging.WARNING):
        base = recorded(vae)
        for _ in range(2):
            pixels, session = edited(vae, base, MIDDLE, record=True)
            check_outside(pixels, base, MIDDLE, session)
            assert "it does something odd" in session.decodes[0].note
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said == ["the VAE decodes densely from now on: it does something odd"]


def test_refusals_in_words() -> None:
    assert "AutoencoderTiny is no AutoencoderKL" in decoder.refusal(AutoencoderTiny())
    vae = make_vae()
    assert decoder.refusal(vae) == ""
    assert "training" in decoder.hindrance(vae.train(), BASE, 1)
    vae.eval()._hf_hook = object()
    assert "offloading" in decoder.hindrance(vae, BASE, 1)
    vae.decode = lambda latents: latents
    assert "a decode() of its own" in decoder.refusal(vae)


def test_runs_do_not_nest_and_decode_once(vae: SparseVAE) -> None:
    base = recorded(vae)
    with pytest.raises(ModeError, match="Modes do not nest"), vae.record(), vae.edit(base):
        pass
    with torch.no_grad(), vae.record() as decoded:
        for _ in range(2):
            vae.decode(BASE)
    assert "more than once" in decoded.note
    with vae.record() as nothing:
        pass
    assert nothing.nbytes == 0 and nothing.num_calls == 0
    _, session = edited(vae, Decoded(BASE, None, None, "why"), MIDDLE)
    assert session.decodes[0].note == "why" and session.decodes[0].pixels is None
    with torch.no_grad():
        assert torch.equal(
            vae(NEW.repeat(1, 1, 4, 4)[:, :3]).sample, vae.original(NEW.repeat(1, 1, 4, 4)[:, :3]).sample
        )


def test_it_is_the_original_in_everything_else(vae: SparseVAE) -> None:
    assert isinstance(vae, AutoencoderKL) and type(vae) is SparseVAE
    assert vae.config is vae.original.config and list(vae.state_dict()) == list(vae.original.state_dict())
    vae.load_state_dict(vae.original.state_dict())
    assert sum(1 for _ in vae.parameters()) == sum(1 for _ in vae.original.parameters())
    for twin in (copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))):
        assert type(twin) is SparseVAE and twin.original is not vae.original
        with torch.no_grad():
            assert torch.equal(twin.decode(BASE).sample, vae.decode(BASE).sample)
    assert SparseVAE(vae.original, EDITOR_CONFIG).sparsify_config.dense_above == decoder.DENSE_ABOVE["cpu"]
    assert BORDER > 0


@pytest.mark.parametrize("method", ["decode", "encode"])
def test_a_method_that_somebody_wraps_is_called_once_and_taken_off_again(vae: SparseVAE, method: str) -> None:
    """As profilers and loggers do."""
    given, expected = getattr(vae, method), vae.decode(BASE, return_dict=False)[0]
    calls = []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return given(*args, **kwargs)

    setattr(vae, method, wrapped)
    assert torch.equal(vae.decode(BASE, return_dict=False)[0], expected)
    vae.encode(torch.zeros(1, 3, 8, 8))
    assert len(calls) == 1
    delattr(vae, method)
    assert getattr(vae, method) == given and "decode" not in vars(vae.original)
