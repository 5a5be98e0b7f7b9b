"""Tiny random models shaped like the real ones, for every test that needs a module to compile.

The UNets are stock diffusers ``UNet2DConditionModel`` with a handful of channels; the rest are small torch
modules that show one thing each. Weights are seeded, and norms get random affines so that a forgotten weight
or bias is seen. Nothing here downloads anything or touches the global random state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEXT_LENGTH = 7
TEXT_CHANNELS = 24
POOLED_CHANNELS = 20

Inputs = dict[str, Any]


class MakeInputs(Protocol):
    """Base inputs of a model: keyword arguments of its ``forward``, latents of ``height × width``."""

    def __call__(self, batch: int = 2, height: int = 16, width: int = 24, seed: int = 0) -> Inputs: ...


@dataclass(frozen=True)
class ZooModel:
    """One small model and how to feed it.

    Attributes:
        name: its key in :data:`ZOO`.
        module: the model, in eval mode, float32.
        make_inputs: base inputs for a batch, a latent size (multiples of ``multiple``) and a seed.
        multiple: the divisor of latent heights and widths.
        text_length: number of text tokens, 0 for a model without text.
        dense_functions: torch functions that mix sites without a sparse form, hence dense islands.
    """

    name: str
    module: nn.Module
    make_inputs: MakeInputs
    multiple: int
    text_length: int = 0
    dense_functions: frozenset[str] = field(default_factory=frozenset)

    def edit_inputs(self, inputs: Inputs, mask: Tensor, seed: int = 1) -> Inputs:
        """Inputs with another text, and ``sample`` changed only where ``mask`` (bool ``[H, W]``) is set."""
        generator = torch.Generator().manual_seed(seed + 7919)
        edited = dict(inputs)
        noise = _like(inputs["sample"], generator)
        edited["sample"] = torch.where(mask, inputs["sample"] + noise, inputs["sample"])
        if "encoder_hidden_states" in inputs:
            edited["encoder_hidden_states"] = _like(inputs["encoder_hidden_states"], generator)
        if "added_cond_kwargs" in inputs:
            added = inputs["added_cond_kwargs"]
            edited["added_cond_kwargs"] = {**added, "text_embeds": _like(added["text_embeds"], generator)}
        return edited


def sd15() -> ZooModel:
    """Stable Diffusion 1.5: convolutions as projections of the transformers, one number of heads."""
    return _unet("sd15", use_linear_projection=False, attention_head_dim=2)


def sd21() -> ZooModel:
    """Stable Diffusion 2.1: linear projections, heads per level."""
    return _unet("sd21", use_linear_projection=True, attention_head_dim=(2, 4, 4))


def sdxl() -> ZooModel:
    """Stable Diffusion XL: a first level without attention, deeper transformers, pooled text and time ids."""
    return _unet(
        "sdxl",
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=POOLED_CHANNELS + 6 * 8,
    )


def inpaint() -> ZooModel:
    """The inpainting UNet: noisy latents, mask and masked image side by side, nine channels in."""
    return _unet("inpaint", in_channels=9, attention_head_dim=2)


def scale_shift() -> ZooModel:
    """Time embeddings that scale and shift the second norm instead of being added; two resnets per block."""
    return _unet(
        "scale_shift",
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=2,
    )


def plain_conv() -> ZooModel:
    """A residual network of convolutions alone: down by stride two, up by repetition."""
    return _plain("plain_conv", PlainConv, multiple=2)


def pooled() -> ZooModel:
    """Average pooling and a running sum along rows, which no sparse rule can describe."""
    return _plain("pooled", Pooled, multiple=2, dense_functions=frozenset({"avg_pool2d", "cumsum"}))


def reflect() -> ZooModel:
    """A reflecting border, which leaves a map of a size that is no level."""
    return _plain("reflect", Reflect, multiple=1, dense_functions=frozenset({"pad"}))


def vae_decoder() -> ZooModel:
    """The decoder of a small ``AutoencoderKL`` with attention in the middle; it doubles height and width."""
    from diffusers import AutoencoderKL

    def build() -> nn.Module:
        vae = AutoencoderKL(
            block_out_channels=(16, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
        )
        return vae.decoder

    return ZooModel("vae_decoder", _seeded(build), _make_sample_inputs(4), multiple=1)


ZOO: dict[str, Callable[[], ZooModel]] = {
    build.__name__: build
    for build in (sd15, sd21, sdxl, inpaint, scale_shift, plain_conv, pooled, reflect, vae_decoder)
}
UNETS: tuple[str, ...] = ("sd15", "sd21", "sdxl", "inpaint", "scale_shift")
"""The members of :data:`ZOO` that are stock ``UNet2DConditionModel``."""


class PlainConv(nn.Module):
    """``[B, 4, H, W] -> [B, 4, H, W]`` for even sizes."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, channels, 3, padding=1)
        self.down = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1)
        self.up = nn.Conv2d(2 * channels, channels, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, channels, 1)
        self.conv_out = nn.Conv2d(channels, 4, 3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        fine = self.conv_in(F.silu(sample))
        coarse = F.silu(self.down(fine))
        coarse = coarse + F.silu(self.middle(coarse))
        up = self.up(F.interpolate(coarse, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.shortcut(fine) + up))


class Pooled(nn.Module):
    """``[B, 4, H, W] -> [B, 4, H, W]`` for even sizes, with two ops that mix sites in their own way.

    A convolution stands between the two, so that they are two islands and not one.
    """

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, channels, 3, padding=1)
        self.norm = nn.GroupNorm(4, channels)
        self.middle = nn.Conv2d(channels, channels, 3, padding=1)
        self.up = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_out = nn.Conv2d(channels, 4, 3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        fine = self.conv_in(sample)
        coarse = F.silu(self.middle(F.avg_pool2d(F.silu(self.norm(fine)), 2)))
        coarse = torch.tanh(torch.cumsum(coarse, dim=-1))
        up = self.up(F.interpolate(coarse, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(fine + up))


class Reflect(nn.Module):
    """``[B, 4, H, W] -> [B, 4, H, W]`` with one convolution over a reflected border."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, channels, 3, padding=1)
        self.bordered = nn.Conv2d(channels, channels, 3)
        self.conv_out = nn.Conv2d(channels, 4, 3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        hidden = F.silu(self.conv_in(sample))
        hidden = hidden + F.silu(self.bordered(F.pad(hidden, (1, 1, 1, 1), mode="reflect")))
        return self.conv_out(hidden)


def _unet(name: str, **overrides: Any) -> ZooModel:
    from diffusers import UNet2DConditionModel

    config: dict[str, Any] = dict(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32, 32),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=TEXT_CHANNELS,
    )
    config.update(overrides)
    module = _seeded(lambda: UNet2DConditionModel(**config))
    text_time = config.get("addition_embed_type") == "text_time"
    make_inputs = _make_unet_inputs(config["in_channels"], text_time)
    return ZooModel(name, module, make_inputs, multiple=4, text_length=TEXT_LENGTH)


def _plain(name: str, build: Callable[[], nn.Module], **fields: Any) -> ZooModel:
    return ZooModel(name, _seeded(build), _make_sample_inputs(4), **fields)


def _seeded(build: Callable[[], nn.Module], seed: int = 1234) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build()
        for child in module.modules():
            if isinstance(child, nn.GroupNorm | nn.LayerNorm):
                nn.init.normal_(child.weight, mean=1.0, std=0.2)
                nn.init.normal_(child.bias, std=0.2)
    return module.eval().requires_grad_(False)


def _make_sample_inputs(channels: int) -> MakeInputs:
    def make_inputs(batch: int = 2, height: int = 16, width: int = 24, seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        return {"sample": torch.randn(batch, channels, height, width, generator=generator)}

    return make_inputs


def _make_unet_inputs(channels: int, text_time: bool) -> MakeInputs:
    def make_inputs(batch: int = 2, height: int = 16, width: int = 24, seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        inputs: Inputs = {
            "sample": torch.randn(batch, channels, height, width, generator=generator),
            "timestep": torch.tensor(481),
            "encoder_hidden_states": torch.randn(batch, TEXT_LENGTH, TEXT_CHANNELS, generator=generator),
        }
        if text_time:
            size = [8.0 * height, 8.0 * width]
            inputs["added_cond_kwargs"] = {
                "text_embeds": torch.randn(batch, POOLED_CHANNELS, generator=generator),
                "time_ids": torch.tensor([[*size, 0.0, 0.0, *size]]).repeat(batch, 1),
            }
        return inputs | {"return_dict": False}

    return make_inputs


def _like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(tensor.shape, generator=generator)
    return noise.to(device=tensor.device, dtype=tensor.dtype)
