"""Whole pipelines to measure: the embedded one, and Stable Diffusion's architectures with random weights.

UNets come from ``subjects.py``; here are the parts around them. Nothing is downloaded: the tokenizer is the embedded
model's, told to make texts of the published length.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from torch import nn

from benchmarks.support.subjects import UNETS, random_unet
from fisedit_compiler.models import SCHEDULERS, load_pipeline, make_scheduler

EMBEDDED = "emoji-scenes"

# The published configurations, with the tokenizer's special tokens left out.
# CLIP ViT-L/14, 123 M parameters.
_SD15_TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
# OpenCLIP ViT-H/14 without its last layer, 340 M parameters.
_SD21_TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
}
# OpenCLIP ViT-bigG/14 with its projection, 695 M parameters; beside ViT-L/14, whose projection SDXL does not use.
_SDXL_TEXT_2: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
TEXT_ENCODERS: dict[str, dict[str, Any]] = {"sd15": _SD15_TEXT, "sd21": _SD21_TEXT, "sdxl": _SD15_TEXT}
"""The first one, by pipeline."""
PREDICTIONS = {"sd15": "epsilon", "sd21": "v_prediction", "sdxl": "epsilon"}
VAE_CONFIG: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
}
"""84 M parameters, the same in all but for SDXL's factor. SDXL's pipeline widens it to float32 for every decode."""
SCHEDULER_CONFIG: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
"""Of a scheduler with one UNet call a step: DDIM, and Euler for SDXL."""
PIPELINES = (EMBEDDED, *TEXT_ENCODERS)
"""Names that :func:`load` takes."""


def add_schedule_options(parser: argparse.ArgumentParser, *, guidance: float) -> None:
    """Which scheduler makes the pictures, and with what guidance. ``--scheduler lcm --steps 4 --guidance 1`` is a
    few-step model's run."""
    parser.add_argument("--scheduler", choices=tuple(SCHEDULERS), help="default: the pipeline's own")
    parser.add_argument("--guidance", type=_weight, default=guidance, help="its weight; 1 or less is none: batch 1")


def _weight(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is no weight; name a finite number, such as 5")
    return value


def load(name: str, device: torch.device | str, dtype: torch.dtype, scheduler: str | None = None) -> Any:
    """A ``StableDiffusionPipeline`` by a name of :data:`PIPELINES`, its progress bar off.

    Args:
        name: of the pipeline.
        device: where its parts are put.
        dtype: of all weights.
        scheduler: a key of :data:`fisedit_compiler.models.SCHEDULERS`; ``None`` for its own.
    """
    if name == EMBEDDED:
        return load_pipeline(device=device, dtype=dtype, scheduler=scheduler)
    pipe = random_pipeline(name, device, dtype)
    if scheduler is not None:
        pipe.scheduler = make_scheduler(scheduler, pipe.scheduler)
    return pipe


def random_pipeline(name: str, device: torch.device | str, dtype: torch.dtype) -> Any:
    """A ``StableDiffusionPipeline`` of a published architecture, untrained, built on its device.

    Times do not depend on the values of weights. The published tokenizer is replaced by the embedded one, which
    knows fewer words; texts are padded to 77 tokens as they are there.

    Args:
        name: ``"sd15"``, ``"sd21"`` or ``"sdxl"``.
        device: where its parts are put.
        dtype: of all weights.
    """
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        EulerDiscreteScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
    )
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    is_xl = name == "sdxl"
    tokenizer = _tokenizer(TEXT_ENCODERS[name]["max_position_embeddings"])
    with torch.device(device):
        encoder = CLIPTextModel(_text_config(TEXT_ENCODERS[name], tokenizer))
        second = CLIPTextModelWithProjection(_text_config(_SDXL_TEXT_2, tokenizer)) if is_xl else None
        own: dict[str, Any] = {"scaling_factor": 0.13025} if is_xl else {}
        vae = AutoencoderKL(**{**VAE_CONFIG, **own}, sample_size=8 * UNETS[name]["sample_size"])
    parts: dict[str, Any] = {
        "vae": _ready(vae, dtype),
        "text_encoder": _ready(encoder, dtype),
        "tokenizer": tokenizer,
        "unet": random_unet(name, device, dtype),
    }
    if second is not None:
        config = {
            key: value for key, value in SCHEDULER_CONFIG.items() if key not in ("clip_sample", "set_alpha_to_one")
        }
        pipe: Any = StableDiffusionXLPipeline(
            **parts,
            text_encoder_2=_ready(second, dtype),
            tokenizer_2=tokenizer,
            scheduler=EulerDiscreteScheduler(**config, prediction_type=PREDICTIONS[name], timestep_spacing="leading"),
            add_watermarker=False,
        )
    else:
        pipe = StableDiffusionPipeline(
            **parts,
            scheduler=DDIMScheduler(**SCHEDULER_CONFIG, prediction_type=PREDICTIONS[name]),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _tokenizer(length: int) -> Any:
    from transformers import CLIPTokenizer

    from fisedit_compiler.models import embedded_model_path

    return CLIPTokenizer.from_pretrained(
        str(embedded_model_path(EMBEDDED) / "tokenizer"), model_max_length=length, local_files_only=True
    )


def _text_config(text: dict[str, Any], tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig

    special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    return CLIPTextConfig(**text, **special)


def _ready(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    return (module if next(module.parameters()).dtype == dtype else module.to(dtype)).eval().requires_grad_(False)
