"""The registry of model classes that the compiler knows without an example call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from fisedit_compiler.compiling import one_at_a_time


@dataclass(frozen=True)
class KnownModel:
    """What the compiler knows about a model class without an example.

    Attributes:
        spatial: names of the arguments that hold latents or features; the first one sets the size, the others
            (such as a ControlNet's residuals) may be absent and have their own resolution.
        multiple: the model's total downsampling, from its config.
        example: builds the keyword arguments of one typical call.
        constants: arguments fixed at capture whatever the caller passes (``return_dict``).
        canonical: brings arguments to one form without changing the result, so that fewer programs are needed.
        wrap: makes the model's output class from the tuple it returns with ``return_dict=False``.
    """

    spatial: tuple[str, ...]
    multiple: Callable[[nn.Module], int]
    example: Callable[[nn.Module], dict[str, Any]]
    constants: Mapping[str, Any]
    canonical: Callable[[dict[str, Any]], dict[str, Any]]
    wrap: Callable[[Any], Any]


def _unet_multiple(unet: nn.Module) -> int:
    config: Any = unet.config
    return int(2 ** (len(config["block_out_channels"]) - 1))


def _unet_example(unet: nn.Module) -> dict[str, Any]:
    config: Any = unet.config
    parameter = next(unet.parameters())
    options: dict[str, Any] = {"device": parameter.device, "dtype": parameter.dtype}
    size = _unet_multiple(unet) * 8
    cross_attention_dim = config["cross_attention_dim"]
    if isinstance(cross_attention_dim, (tuple, list)):
        cross_attention_dim = cross_attention_dim[0]
    example: dict[str, Any] = {
        "sample": torch.zeros(2, config["in_channels"], size, size, **options),
        "timestep": torch.zeros((), device=parameter.device),
        "encoder_hidden_states": torch.zeros(2, 77, cross_attention_dim, **options),
    }
    if config["addition_embed_type"] == "text_time":
        time_ids = 6
        pooled = config["projection_class_embeddings_input_dim"] - time_ids * config["addition_time_embed_dim"]
        example["added_cond_kwargs"] = {
            "text_embeds": torch.zeros(2, pooled, **options),
            "time_ids": torch.zeros(2, time_ids, **options),
        }
    if config.get("time_cond_proj_dim") is not None:  # pipelines of such a UNet always give it a weight of guidance
        example["timestep_cond"] = torch.zeros(2, config["time_cond_proj_dim"], **options)
    return example


def _unet_canonical(arguments: dict[str, Any]) -> dict[str, Any]:
    """One float32 timestep for whole batches: the sinusoidal embedding casts it to float32 first thing."""
    timestep = arguments.get("timestep")
    if isinstance(timestep, (int, float)):
        timestep = torch.tensor(timestep, dtype=torch.float64, device=arguments["sample"].device)
    if isinstance(timestep, torch.Tensor) and timestep.numel() == 1:
        arguments = {**arguments, "timestep": timestep.reshape(()).to(arguments["sample"].device, torch.float32)}
    return arguments


@cache
@one_at_a_time  # two threads that import diffusers for the first time get an ImportError
def known_models() -> dict[type[nn.Module], KnownModel]:
    """The registry of model classes that need no example inputs. diffusers is imported here, not at import time."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

    return {
        UNet2DConditionModel: KnownModel(
            spatial=(
                "sample",
                "down_block_additional_residuals",
                "mid_block_additional_residual",
                "down_intrablock_additional_residuals",
            ),
            multiple=_unet_multiple,
            example=_unet_example,
            constants={"return_dict": False},
            canonical=_unet_canonical,
            wrap=lambda outputs: UNet2DConditionOutput(sample=outputs[0]),
        ),
    }


def known_model(module: nn.Module) -> KnownModel | None:
    """The registry entry of ``module``'s class, or ``None``."""
    for model_class, entry in known_models().items():
        if isinstance(module, model_class):
            return entry
    return None
