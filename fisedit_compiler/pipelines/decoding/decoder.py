"""What of a VAE is compiled, when that is not possible, and how far a changed latent reaches into the picture."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fisedit_compiler.api
from fisedit_compiler.config import SparsifyConfig
from fisedit_compiler.masks import grown
from fisedit_compiler.module import SparseModule

BORDER = 6
"""Latent sites by which a mask is grown for the decoder: pixels beyond are the base's.

A decoder's convolutions carry a change far, but it fades. Measured as the step over the border, where the edit's pixels
meet the base's: docs/how-it-works.md."""

DENSE_ABOVE = {"cpu": 0.85}
"""Share of the sites, border included, above which a dense decode is faster, by device type; never where there is none.

Measured with the embedded decoder on one thread: a sparse decode takes 0.95 of a dense one's time at 82 % of the sites
and 1.15 at 97 %. ``python -m benchmarks.decoding`` measures it."""

SHARE_OF_FREE_MEMORY = 0.5
"""Of the memory that is free, what a decoder's recording may take at most."""


class Decoding(nn.Module):
    """``AutoencoderKL``'s way from latents to pixels, with its own modules: what ``decode`` does without tiles."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.post_quant_conv: nn.Module | None = vae.post_quant_conv
        self.decoder: nn.Module = vae.decoder
        self.training = vae.training

    def forward(self, latents: Tensor) -> Tensor:
        """Latents ``[B, C, H, W]`` to pixels ``[B, 3, k*H, k*W]``."""
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        pixels: Tensor = self.decoder(latents)
        return pixels


def decoder_config(config: SparsifyConfig, device: torch.device) -> SparsifyConfig:
    """The configuration of the decoder beside a UNet's.

    Statistics are the recorded ones: corrected ones would make a step at the border, outside which the base's stay.
    """
    above = config.dense_above
    return replace(
        SparsifyConfig(),
        multiple=1,
        backend=config.backend,
        cache=config.cache,
        check_inputs=False,  # compared once for dense and sparse decodes
        dense_above=DENSE_ABOVE.get(device.type, 1.0) if above is None else above,
    )


def compiled_decoder(vae: Any, config: SparsifyConfig) -> SparseModule:
    """The compiled decoder of a VAE; captured here, or at the first decode if the VAE is widened for that.

    Raises:
        CaptureError: it cannot be captured.
    """
    weight = next(vae.decoder.parameters())
    options = decoder_config(config, weight.device)
    example = None
    if not is_widened(vae):
        latents = torch.zeros(1, vae.config.latent_channels, 16, 16, device=weight.device, dtype=weight.dtype)
        example = {"latents": latents}
    return fisedit_compiler.api.sparsify(Decoding(vae), options, example_inputs=example)


def is_widened(vae: Any) -> bool:
    """Whether pipelines cast the VAE to float32 for every decode (SDXL's in half precision)."""
    return bool(getattr(vae.config, "force_upcast", False)) and vae.dtype == torch.float16


def refusal(vae: Any) -> str:
    """Why a VAE's decoder is not compiled, in words; empty if it can be tried."""
    from diffusers import AutoencoderKL

    name = type(vae).__name__
    if not isinstance(vae, AutoencoderKL):
        return f"{name} is no AutoencoderKL, and what its decode() does is not known"
    own = [method for method in ("decode", "_decode") if _is_replaced(vae, method, AutoencoderKL)]
    if own:
        return f"this {name} has a {own[0]}() of its own"
    return ""


def hindrance(vae: Any, latents: Tensor, samples: int) -> str:
    """Why these latents are decoded densely by the VAE as it is set now, in words; empty if they need not be.

    Args:
        vae: the user's.
        latents: to decode, ``[B, C, H, W]``.
        samples: of them, those that one run makes: more than one are several pictures.
    """
    if why := refusal(vae):
        return why
    if vae.training:
        return "the VAE is in training mode"
    if hasattr(vae, "_hf_hook") or hasattr(vae.decoder, "_hf_hook"):
        return "hooks move the VAE between devices (model offloading)"
    limit = vae.tile_latent_min_size
    if vae.use_tiling and max(latents.shape[-2:]) > limit:
        return (
            f"tiling is on and the latents are larger than a tile ({limit} sites): tiles have statistics of their own"
        )
    if vae.use_slicing and samples > 1:
        return "slicing is on: it decodes the pictures of a run one by one"
    return ""


def bordered(mask: Tensor) -> Tensor:
    """A bool mask ``[H, W]`` with the sites around it that the decoder computes too; an empty one stays empty."""
    return grown(mask.cpu(), BORDER)


def as_pixels(sites: Tensor, scale: int) -> Tensor:
    """A bool mask ``[H, W]`` of sites as one of pixels, ``[scale * H, scale * W]``."""
    return sites.repeat_interleave(scale, 0).repeat_interleave(scale, 1)


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free where the decoder runs; ``None`` if nobody says."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        (available,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        return 1024 * int(available)
    return None


def _is_replaced(vae: Any, method: str, known: type) -> bool:
    return method in vars(vae) or getattr(type(vae), method, None) is not getattr(known, method)
