"""What the oracle needs to know of single boundaries: a norm by another map's statistics, convolutions of one site."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def normalised_as(
    base: Tensor, input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Group normalisation of ``input`` (``[B, C, ...]``) by the mean and biased variance of ``base``."""
    precision = torch.float64 if input.dtype == torch.float64 else torch.float32
    batch, channels = input.shape[:2]
    groups = base.to(precision).reshape(batch, num_groups, -1)
    mean = groups.mean(dim=-1, keepdim=True)
    variance = ((groups - mean) ** 2).mean(dim=-1, keepdim=True)
    normal = (input.to(precision).reshape(batch, num_groups, -1) - mean) / torch.sqrt(variance + eps)
    normal = normal.reshape(input.shape)
    per_channel = (1, channels) + (1,) * (input.ndim - 2)
    if weight is not None:
        normal = normal * weight.to(precision).reshape(per_channel)
    if bias is not None:
        normal = normal + bias.to(precision).reshape(per_channel)
    return normal.to(input.dtype)


def is_pointwise_conv(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """True for a 1x1 convolution that reads each output site's own site and nothing else."""
    if name != "conv2d":
        return False
    given = dict(zip(("input", "weight", "bias", "stride", "padding"), args, strict=False)) | dict(kwargs)
    ones, zeros = (1, 1, (1,), (1, 1), [1, 1]), (0, 0, (0,), (0, 0), [0, 0], "valid", "same")
    return (
        tuple(given["weight"].shape[2:]) == (1, 1)
        and given.get("stride", 1) in ones
        and given.get("padding", 0) in zeros
    )
