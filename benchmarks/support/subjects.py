"""What is measured: the UNets, the inputs of one call, and masks of a given area.

Timing and printing live in ``harness.py``, questions in the other modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

# The published configurations; latents are an eighth of the image.
# Stable Diffusion 1.5 at 512x512, 860 M parameters.
SD15_CONFIG: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
# Stable Diffusion 2.1 at 768x768, 866 M parameters.
SD21_CONFIG: dict[str, Any] = {
    "sample_size": 96,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "upcast_attention": False,
}
# Stable Diffusion XL base at 1024x1024, 2567 M parameters.
SDXL_CONFIG: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# The embedded model's, as far as its convolutions go.
EMBEDDED_CONFIG: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (64, 128, 192, 256),
    "layers_per_block": 1,
}
UNETS: dict[str, dict[str, Any]] = {"sd15": SD15_CONFIG, "sd21": SD21_CONFIG, "sdxl": SDXL_CONFIG}
"""Configurations by the names that benchmarks take."""

TIMESTEP = 500
MASK_CENTRE = (0.42, 0.57)
"""Where the square masks sit, as fractions of height and width: off the centre, so no symmetry helps."""


@dataclass(frozen=True)
class Call:
    """The inputs of one UNet call: latents, and the text of a base prompt and of an edited one.

    Attributes:
        sample: ``[batch, channels, height, width]``.
        base_text: ``[batch, tokens, cross_attention_dim]``.
        edit_text: as ``base_text``, of another prompt.
    """

    sample: torch.Tensor
    base_text: torch.Tensor
    edit_text: torch.Tensor

    def dense(self, unet: Callable[..., Any], *, text: torch.Tensor | None = None) -> torch.Tensor:
        """Call a UNet, compiled or not, as a diffusers pipeline does."""
        output: torch.Tensor = unet(
            self.sample,
            torch.tensor(TIMESTEP, device=self.sample.device),
            encoder_hidden_states=self.base_text if text is None else text,
            return_dict=False,
        )[0]
        return output


def load_unet(model: Path | None, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The UNet of the embedded model, or of a directory in diffusers layout."""
    from fisedit_compiler.models import load_pipeline

    return load_pipeline(model, device=device, dtype=dtype).unet.eval()


def random_unet(name: str, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """A UNet of a published architecture (a key of :data:`UNETS`), untrained, built on its device.

    Times do not depend on the values of weights.
    """
    from diffusers import UNet2DConditionModel

    with torch.device(device):
        unet = UNet2DConditionModel(**UNETS[name])
    return (unet if unet.dtype == dtype else unet.to(dtype)).eval().requires_grad_(False)


@dataclass(frozen=True)
class Prompt:
    """What a UNet call is told about one prompt.

    Attributes:
        text: ``[batch, tokens, cross_attention_dim]``.
        added: the model's ``added_cond_kwargs`` (SDXL: pooled text and image size), or ``None``.
    """

    text: torch.Tensor
    added: Mapping[str, torch.Tensor] | None = None


class Run:
    """The inputs of a short denoising run: per call a sample and a timestep, drawn at random once.

    Args:
        unet: whose inputs they are; sizes, device and dtype are read from it.
        calls: number of UNet calls.
        batch: 2 is one image with guidance.
        tokens: length of the text.
        size: sites along a side of the latents, or along height and width; the model's own if left out.
    """

    def __init__(
        self,
        unet: nn.Module,
        *,
        calls: int,
        batch: int = 2,
        tokens: int = 77,
        size: int | tuple[int, int] | None = None,
    ) -> None:
        config: Any = unet.config
        self._config: dict[str, Any] = dict(config)
        self._parameter = next(unet.parameters())
        self._generator = torch.Generator().manual_seed(0)
        self.calls, self.batch, self._tokens = calls, batch, tokens
        size = size or int(self._config["sample_size"])
        self.height, self.width = (size, size) if isinstance(size, int) else size
        self.timesteps = torch.linspace(900, 100, calls, device=self._parameter.device).long().unbind()
        self.samples = [self._normal(batch, 4, self.height, self.width) for _ in range(calls)]
        self._noise = self._normal(batch, 4, self.height, self.width)
        self.prompt = self.new_prompt()

    def new_prompt(self) -> Prompt:
        """A prompt never seen before."""
        text = self._normal(self.batch, self._tokens, int(self._config["cross_attention_dim"]))
        if self._config["addition_embed_type"] != "text_time":
            return Prompt(text)
        pooled: int = (
            self._config["projection_class_embeddings_input_dim"] - 6 * self._config["addition_time_embed_dim"]
        )
        image = [8.0 * self.height, 8.0 * self.width]
        time_ids = torch.tensor([[*image, 0.0, 0.0, *image]] * self.batch).to(text)
        return Prompt(text, {"text_embeds": self._normal(self.batch, pooled), "time_ids": time_ids})

    def edited_samples(self, mask: torch.Tensor) -> list[torch.Tensor]:
        """Per call the recorded sample, changed inside the mask only."""
        return [torch.where(mask, sample + self._noise, sample) for sample in self.samples]

    def dense(self, unet: Any, call: int, samples: Sequence[torch.Tensor], prompt: Prompt) -> torch.Tensor:
        """One call of a UNet, compiled or not, as a diffusers pipeline makes it."""
        extra = {} if prompt.added is None else {"added_cond_kwargs": prompt.added}
        output: torch.Tensor = unet(
            samples[call], self.timesteps[call], encoder_hidden_states=prompt.text, return_dict=False, **extra
        )[0]
        return output

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).to(self._parameter.device, self._parameter.dtype)


def make_call(unet: nn.Module, *, batch: int, height: int, width: int, tokens: int = 32, seed: int = 0) -> Call:
    """Random inputs for ``unet`` at a latent size, the same on every machine (drawn on the CPU)."""
    config: Any = unet.config
    parameter = next(unet.parameters())
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(parameter.device, parameter.dtype)

    text = (batch, tokens, int(config["cross_attention_dim"]))
    return Call(normal(batch, int(config["in_channels"]), height, width), normal(*text), normal(*text))


def square_mask(fraction: float, height: int, width: int) -> torch.Tensor:
    """A compact mask of about ``fraction`` of the sites, shaped like the canvas and off its centre.

    Returns:
        bool, ``[height, width]``.

    Raises:
        ValueError: the fraction is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"a mask fraction is above 0 and at most 1, got {fraction}")
    mask = torch.zeros(height, width, dtype=torch.bool)
    side = math.sqrt(fraction)
    rows = min(height, max(1, round(height * side)))
    columns = min(width, max(1, round(fraction * height * width / rows)))
    top = min(max(0, round(height * MASK_CENTRE[0] - rows / 2)), height - rows)
    left = min(max(0, round(width * MASK_CENTRE[1] - columns / 2)), width - columns)
    mask[top : top + rows, left : left + columns] = True
    return mask


def scattered_mask(fraction: float, height: int, width: int) -> torch.Tensor:
    """Single sites all over the canvas, bool ``[height, width]``; the same every time."""
    return torch.rand(height, width, generator=torch.Generator().manual_seed(0)) < fraction


def thin_mask(height: int, width: int, thickness: int = 2) -> torch.Tensor:
    """The outline of an ellipse, ``thickness`` sites wide, bool ``[height, width]``."""
    y, x = torch.arange(height)[:, None] - MASK_CENTRE[0] * height, torch.arange(width) - MASK_CENTRE[1] * width
    radius = (y**2 + (x * height / width) ** 2).sqrt()
    return (radius - 0.35 * height).abs() <= thickness / 2


def moved_mask(mask: torch.Tensor, sites: int) -> torch.Tensor | None:
    """The mask moved by ``sites`` along both axes, or ``None`` where the canvas has no room for it.

    Moved by a multiple of a UNet's total downsampling, a mask away from the borders keeps its number of sites at
    every level.
    """
    lines, columns = mask.any(1).nonzero().flatten().tolist(), mask.any(0).nonzero().flatten().tolist()
    for step in (sites, -sites):
        # A margin of one coarse site, so that no ring is cut off by the border.
        inside = lines[0] + step >= sites and columns[0] + step >= sites
        inside &= lines[-1] + step < mask.shape[0] - sites and columns[-1] + step < mask.shape[1] - sites
        if inside:
            return mask.roll((step, step), (0, 1))
    return None
