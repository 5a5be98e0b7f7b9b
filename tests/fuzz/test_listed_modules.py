"""Modules whose layouts were once wrong in silence, or crashed, by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisedit_compiler import SparsifyConfig, sparsify
from fisedit_compiler.errors import CaptureError, ConfigError, LayoutError
from tests.fuzz.oracle import problem_of
from tests.support.zoo import ZOO

CHANNELS, HEIGHT, WIDTH = 4, 8, 12


class Between(nn.Module):
    """A convolution, a function of its result, a convolution."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.conv_in, self.conv_out = (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(2))
        self.function, self.parts = function, nn.ModuleDict(parts)

    def forward(self, sample: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        y = self.conv_in(sample)
        text = () if encoder_hidden_states is None else (encoder_hidden_states,)
        y = self.function(self.parts, y, *text)
        return self.conv_out(torch.tanh(y))  # type: ignore[no-any-return]


def as_many_sites_as_channels() -> Tensor:
    mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    mask[3, 4 : 4 + CHANNELS] = True
    return mask


def drawn(seed: int, text: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {"sample": torch.randn(2, CHANNELS, HEIGHT, WIDTH, generator=generator)}
    return made | ({"encoder_hidden_states": torch.randn(2, text, CHANNELS, generator=generator)} if text else {})


def check(module: nn.Module, multiple: int | None = None, text: int = 0) -> None:
    module = module.eval().requires_grad_(False)
    with torch.no_grad():
        assert problem_of(module, drawn(0, text), drawn(1, text), as_many_sites_as_channels(), multiple) == ""


def fold_channels_into_batch(parts: Any, y: Tensor) -> Tensor:
    batch, channels, height, width = y.shape
    return parts.norm(y.reshape(batch * 2, channels // 2, height, width)).reshape(y.shape)


def fold_channels_behind_batch(parts: Any, y: Tensor) -> Tensor:
    batch, channels, height, width = y.shape
    folded = y.reshape(batch, 2, channels // 2, height, width).transpose(0, 1).reshape(-1, channels // 2, height, width)
    folded = parts.norm(folded).reshape(2, batch, channels // 2, height, width)
    return folded.transpose(0, 1).reshape(y.shape)


def heads_of_a_map_in_the_batch(parts: Any, y: Tensor) -> Tensor:
    batch, channels, height, width = y.shape
    tokens = y.reshape(batch * 2, channels // 2, height * width).transpose(1, 2)
    tokens = F.scaled_dot_product_attention(torch.tanh(tokens), tokens, tokens)
    return y + tokens.transpose(1, 2).reshape(y.shape)


def windows(parts: Any, y: Tensor) -> Tensor:
    batch, channels, height, width = y.shape
    cut = y.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 3, 5, 1).contiguous()
    tokens = parts.norm(cut.view(-1, 4, channels))
    tokens = F.scaled_dot_product_attention(tokens, tokens, tokens)
    back = tokens.view(batch, height // 2, width // 2, 2, 2, channels).permute(0, 5, 1, 3, 2, 4)
    return y + back.contiguous().view(y.shape)


def plain_attention_to_text(parts: Any, y: Tensor, text: Tensor) -> Tensor:
    """As diffusers' plain ``AttnProcessor``: heads folded into the batch, which takes sizes of the text."""

    def fold(x: Tensor) -> Tensor:
        batch, tokens, channels = x.shape
        return x.reshape(batch, tokens, 2, channels // 2).permute(0, 2, 1, 3).reshape(-1, tokens, channels // 2)

    query, key = fold(y.flatten(2).transpose(1, 2)), fold(parts.key(text))
    empty = torch.empty(query.shape[0], query.shape[1], key.shape[1], dtype=y.dtype)
    scores = torch.baddbmm(empty, query, key.transpose(-1, -2), beta=0, alpha=0.5).softmax(-1)
    result = torch.bmm(scores, key).reshape(y.shape[0], 2, -1, y.shape[1] // 2).permute(0, 1, 3, 2)
    return y + result.reshape(y.shape)


def places_in_the_text(parts: Any, y: Tensor, text: Tensor) -> Tensor:
    places = torch.arange(text.shape[1]) % (text.shape[1] // 2 + 1)
    return y + ((text * places[:, None]).sum(1) / text.shape[1])[:, :, None, None]


def low_frequencies(parts: Any, y: Tensor) -> Tensor:
    """As FreeU: a rectangle about half of height and width."""
    spectrum = torch.fft.fftshift(torch.fft.fftn(y, dim=(-2, -1)), dim=(-2, -1))
    kept = torch.ones(y.shape)
    middle = y.shape[-2] // 2, y.shape[-1] // 2
    kept[..., middle[0] - 1 : middle[0] + 1, middle[1] - 1 : middle[1] + 1] = 0.5
    return torch.fft.ifftn(torch.fft.ifftshift(spectrum * kept, dim=(-2, -1)), dim=(-2, -1)).real


def third_of_the_tokens(parts: Any, y: Tensor) -> Tensor:
    tokens = y.flatten(2)
    return y + tokens[..., : (y.shape[2] * y.shape[3]) // 3].mean(2)[:, :, None, None]


def two_dilations(parts: Any, y: Tensor) -> Tensor:
    return parts.near(y) + parts.far(y) + parts.wide(y)


def matrix_of_the_image(parts: Any, y: Tensor) -> Tensor:
    last = y.permute(0, 2, 3, 1)
    matrix = F.linear(last, torch.eye(CHANNELS)).mean((0, 1, 2)).outer(torch.ones(CHANNELS))
    return y + F.linear(last, matrix).permute(0, 3, 1, 2)


CASES: dict[str, tuple[Callable[..., Tensor], dict[str, nn.Module], int]] = {
    "channels into the batch": (fold_channels_into_batch, {"norm": nn.GroupNorm(1, 2)}, 0),
    "channels in front of the batch": (fold_channels_behind_batch, {"norm": nn.GroupNorm(1, 2)}, 0),
    "heads of a map into the batch": (heads_of_a_map_in_the_batch, {}, 0),
    "windows": (windows, {"norm": nn.LayerNorm(CHANNELS)}, 0),
    "mean of the batch": (lambda parts, y: y + torch.tanh(y.mean(0)), {}, 0),
    "largest of the batch": (lambda parts, y: y + torch.tanh(y.amax(0, keepdim=True)), {}, 0),
    "first sample": (lambda parts, y: y + y[0], {}, 0),
    "first channel": (lambda parts, y: y + y[:, 0][:, None], {}, 0),
    "stacked in front": (lambda parts, y: torch.stack([y, torch.tanh(y)])[1], {}, 0),
    "width before height": (
        lambda parts, y: parts.norm(y.transpose(2, 3)).transpose(2, 3),
        {"norm": nn.GroupNorm(2, 4)},
        0,
    ),
    "dilations": (
        two_dilations,
        {
            "near": nn.Conv2d(4, 4, 3, padding=1),
            "far": nn.Conv2d(4, 4, 3, padding=2, dilation=2),
            "wide": nn.Conv2d(4, 4, 3, padding=(1, 2), dilation=(1, 2)),
        },
        0,
    ),
    "heads and a text's length": (plain_attention_to_text, {"key": nn.Linear(CHANNELS, CHANNELS)}, 5),
    "numbers seen as complex ones": (
        lambda parts, y: torch.view_as_real(
            torch.view_as_complex(y.permute(0, 2, 3, 1).unflatten(-1, (-1, 2)).contiguous()) * (0.6 + 0.8j)
        ).flatten(-2).permute(0, 3, 1, 2),
        {},
        0,
    ),
    "places in a text": (places_in_the_text, {}, 5),
    "half of height and width": (low_frequencies, {}, 0),
    "a layer whose matrix is its sibling's result": (matrix_of_the_image, {}, 0),
}  # fmt: skip


@pytest.mark.parametrize("multiple", [None, 4], ids=["divisor found", "divisor given"])
@pytest.mark.parametrize("name", CASES)
def test_it_is_right(name: str, multiple: int | None) -> None:
    function, parts, text = CASES[name]
    torch.manual_seed(0)
    check(Between(function, **parts), multiple, text)


def test_sizes_that_round_are_right_where_the_divisor_is_given_and_refused_else() -> None:
    module = Between(third_of_the_tokens).eval()
    check(module, multiple=4)
    with pytest.raises(CaptureError, match="rounds its sizes"):
        sparsify(module, SparsifyConfig(cache=False), example_inputs=drawn(0))


def test_blocks_of_score_networks_are_right() -> None:
    """NCSN++: strided filters that run with all channels folded into the batch."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    module = UNet2DModel(
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        norm_num_groups=None,
        mid_block_scale_factor=math.sqrt(2),
        time_embedding_type="fourier",
        attention_head_dim=4,
    )
    module = module.eval().requires_grad_(False)
    with torch.no_grad():
        base, other = (
            {"sample": drawn(seed)["sample"][:, :3], "timestep": torch.tensor([3.0, 3.0])} for seed in (0, 1)
        )
        assert problem_of(module, base, other, as_many_sites_as_channels(), 2) == ""


@pytest.mark.parametrize("change", ["plain attention", "freeu"])
def test_stable_diffusion_with_other_code_in_it_is_right(change: str) -> None:
    """Heads folded into the batch by diffusers' older processor; a low-pass filter about half of the map."""
    from diffusers.models.attention_processor import AttnProcessor

    model = ZOO["sd15"]()
    if change == "freeu":
        model.module.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    else:
        model.module.set_attn_processor(AttnProcessor())
    mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    mask[2:5, 3:7] = True
    calls = [{**model.make_inputs(2, HEIGHT, WIDTH, seed), "return_dict": False} for seed in (0, 1)]
    with torch.no_grad():
        assert problem_of(model.module, *calls, mask, model.multiple) == ""


def test_operations_on_memory_are_refused_in_words() -> None:
    module = Between(lambda parts, y: y + y.contiguous().as_strided(y.shape, y.stride())).eval()
    with pytest.raises(LayoutError, match="names places in memory"):
        sparsify(module, SparsifyConfig(cache=False), example_inputs=drawn(0))


def test_copies_of_what_mixes_samples_are_refused_in_words() -> None:
    module = Between(lambda parts, y: y.roll(1, 0)).eval().requires_grad_(False)
    base = drawn(0)
    compiled = sparsify(module, SparsifyConfig(cache=False), example_inputs=base)
    with compiled.record() as recording:
        compiled(**base)
    twice = {name: value.repeat_interleave(2, 0) for name, value in base.items()}
    with (
        pytest.raises(ConfigError, match=r"aten\.roll.*mixes the samples"),
        compiled.edit(recording, as_many_sites_as_channels(), copies=2),
    ):
        compiled(**twice)
