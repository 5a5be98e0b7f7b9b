"""What is measured: the UNets, the inputs of one call, and masks of a given area.

Timing and printing live in ``harness.py``, questions in the other modules.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Stable Diffusion 2.1 at 768x768: the published configuration, 866 M parameters.
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

    def dense(self, unet: nn.Module, *, text: torch.Tensor | None = None) -> torch.Tensor:
        """Call a UNet, compiled or not, as a diffusers pipeline does."""
        return unet(
            self.sample,
            torch.tensor(TIMESTEP, device=self.sample.device),
            encoder_hidden_states=self.base_text if text is None else text,
            return_dict=False,
        )[0]


def load_unet(model: Path | None, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The UNet of the embedded model, or of a directory in diffusers layout."""
    from fisedit_compiler.models import load_pipeline

    return load_pipeline(model, device=device, dtype=dtype).unet.eval()


def random_sd21_unet(device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """A UNet of the size of Stable Diffusion 2.1, untrained: times do not depend on the values of weights."""
    from diffusers import UNet2DConditionModel

    with torch.device(device):
        unet = UNet2DConditionModel(**SD21_CONFIG)
    return (unet if unet.dtype == dtype else unet.to(dtype)).eval()


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
