"""Inputs to check or time a program with when nobody gives any: random, of the shapes that its signature asks for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fisedit_compiler.geometry.site_plan import SitePlan
from fisedit_compiler.graph.layout import image
from fisedit_compiler.graph.signatures import TensorSpec
from fisedit_compiler.lowering.program import CompiledProgram

BATCH = 2
FEW_TOKENS = 7
"""Text tokens of a call that is only compared: fewer than a prompt's, so that it is cheap."""
TIMESTEP = 481


def sample_inputs(
    program: CompiledProgram, height: int, width: int, generator: torch.Generator, tokens: int = FEW_TOKENS
) -> dict[str, Tensor]:
    """Tensors of one call by placeholder name, for a spatial input of ``height`` by ``width`` sites."""
    signature = program.signature
    return {
        spec.identifier(): _sample(spec, height, width, tokens, signature.device, generator)
        for spec in signature.tensors
    }


def edited_inputs(
    program: CompiledProgram, base: Mapping[str, Tensor], plan: SitePlan, generator: torch.Generator
) -> dict[str, Tensor]:
    """An edit of ``base``: maps differ inside the mask, the rest everywhere; timestep and whole numbers stay."""
    edited = {}
    for spec in program.signature.tensors:
        value = base[spec.identifier()]
        if is_timestep(spec) or not value.is_floating_point():
            edited[spec.identifier()] = value
            continue
        other = _noise(tuple(value.shape), value.dtype, str(value.device), generator)
        if spec.is_spatial:
            other = torch.where(plan.selector(image(spec.level)), value + other, value)
        edited[spec.identifier()] = other
    return edited


def call_before(
    program: CompiledProgram, tensors: Mapping[str, Tensor], generator: torch.Generator
) -> dict[str, Tensor]:
    """Another call of the same shapes, with other contents everywhere: what a cache may wrongly remember."""
    before = {}
    for spec in program.signature.tensors:
        value = tensors[spec.identifier()]
        if is_timestep(spec):
            before[spec.identifier()] = value + 1
        elif value.is_floating_point():
            before[spec.identifier()] = _noise(tuple(value.shape), value.dtype, str(value.device), generator)
        else:
            before[spec.identifier()] = value
    return before


def scalars_of(program: CompiledProgram, tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """The timestep as a number if it is one, as sessions tell the cache of hoisted values."""
    return {s.name: float(tensors[s.name]) for s in program.signature.tensors if is_timestep(s) and not s.axes}


def is_timestep(spec: TensorSpec) -> bool:
    """Whether a tensor argument says how far the run has come."""
    return spec.name == "timestep"


def _sample(spec: TensorSpec, height: int, width: int, tokens: int, device: str, generator: torch.Generator) -> Tensor:
    scale = spec.level if spec.is_spatial else 1
    known = {"b": BATCH, "h": int(height / scale), "w": int(width / scale), "t": tokens}
    shape = tuple(known[axis] if isinstance(axis, str) else axis for axis in spec.axes)
    if is_timestep(spec):
        return torch.full(shape, TIMESTEP, dtype=spec.dtype, device=device)
    if not spec.dtype.is_floating_point:
        return torch.ones(shape, dtype=spec.dtype, device=device)
    return _noise(shape, spec.dtype, device, generator)


def _noise(shape: tuple[int, ...], dtype: torch.dtype, device: str, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32).to(device, dtype)
