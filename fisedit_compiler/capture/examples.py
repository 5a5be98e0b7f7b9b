"""The arguments that a module is exported with: those of a call, in sizes that can be told apart."""

from __future__ import annotations

from typing import Any

import torch

from fisedit_compiler.errors import CaptureError
from fisedit_compiler.graph.signatures import CallSignature, TensorSpec

EXAMPLE_SIZES = {"b": 2, "h": 3, "w": 5, "t": 7}
"""Sizes that are exported with, in units of what they are multiples of; distinct, so that sizes can be told apart."""


def named_examples(
    arguments: dict[str, Any], signature: CallSignature, multiple: int, height: int, width: int
) -> dict[str, Any]:
    """Arguments of ``multiple * height`` by ``multiple * width``, other sizes than the caller's and all distinct.

    So nothing is specialised by coincidence.
    """
    specs = {spec.name: spec for spec in signature.tensors}

    def example(name: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            scale = scale_of(multiple, specs[name])
            known = {"b": EXAMPLE_SIZES["b"], "t": EXAMPLE_SIZES["t"], "h": scale * height, "w": scale * width}
            axes = zip(specs[name].axes, value.shape, strict=True)
            shape = [known[axis] if isinstance(axis, str) else size for axis, size in axes]
            return torch.zeros(shape, dtype=value.dtype, device=value.device)
        return map_children(name, value, example)

    return {name: example(name, value) for name, value in arguments.items()}


def scale_of(multiple: int, spec: TensorSpec) -> int:
    """Height of a spatial input in units of ``h`` (1 for all other inputs)."""
    if not spec.is_spatial:
        return 1
    scale = multiple / spec.level
    if scale.denominator != 1:
        raise CaptureError(
            f"Spatial input {spec.name} is {spec.level} times smaller than the first one, which is more than the "
            f"divisor {multiple} of its sizes; pass SparsifyConfig(multiple=k) with a multiple of {spec.level}."
        )
    return int(scale)


def map_children(name: str, value: Any, function: Any) -> Any:
    if isinstance(value, dict):
        return {key: function(f"{name}.{key}", item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and any(isinstance(item, (torch.Tensor, list, dict)) for item in value):
        return type(value)(function(f"{name}.{index}", item) for index, item in enumerate(value))
    return value
