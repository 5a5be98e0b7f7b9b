"""The one verb of the compiler: :func:`sparsify`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from fisedit_compiler.config import SparsifyConfig
from fisedit_compiler.errors import CaptureError, ConfigError, ModeError
from fisedit_compiler.module import SparseModule


def sparsify(
    module: nn.Module, config: SparsifyConfig | None = None, *, example_inputs: Mapping[str, Any] | None = None
) -> SparseModule:
    """Compile ``module`` for sparse editing; the module itself is left untouched.

    Args:
        module: any module whose forward takes maps ``[batch, channels, height, width]``; a diffusers
            ``UNet2DConditionModel`` needs nothing else.
        config: options; defaults are FISEdit's approximations.
        example_inputs: keyword arguments of one typical call, for modules the registry does not know. Without them
            such a module is compiled at its first recorded call.

    Returns:
        A module with the same calls as the original, and the modes ``record()`` and ``edit()``.

    Raises:
        ConfigError: ``module`` is no module, such as a whole pipeline, ``config`` no ``SparsifyConfig``, or
            ``example_inputs`` are not the arguments of a call.
        CaptureError: torch.export cannot capture the module, or it has no spatial input.
        LayoutError: an output mixes sites, so that nothing outside a mask could be kept.
    """
    _check(module, config)
    if example_inputs is not None:
        _check_inputs(module, example_inputs)
    if isinstance(module, SparseModule):
        raise ModeError("This module is already the result of sparsify(); pass the original (`compiled.original`).")
    if module.training:
        raise CaptureError("The module is in training mode; call .eval() first (dropout would differ between runs).")
    compiled = SparseModule(module, config or SparsifyConfig())
    known = compiled._programs.known
    if example_inputs is not None:
        compiled._programs.prepare(example_inputs)
    elif known is not None:
        compiled._programs.prepare(known.example(module))
    return compiled


def _check(module: object, config: object) -> None:
    if config is not None and not isinstance(config, SparsifyConfig):
        raise ConfigError(
            f"config is of type {type(config).__name__}; pass a SparsifyConfig, such as "
            "sparsify(unet, SparsifyConfig(backend='eager'))"
        )
    if isinstance(module, nn.Module):
        return
    if isinstance(module, type):
        what = f"the class {module.__name__}; pass an instance of it, with its weights"
    elif isinstance(getattr(module, "unet", None), nn.Module):
        what = f"a {type(module).__name__}; pass its UNet, pipe.unet = sparsify(pipe.unet), or make an Editor(pipe)"
    else:
        what = f"an object of type {type(module).__name__}; pass a torch.nn.Module, such as pipe.unet"
    raise ConfigError(f"sparsify() compiles one module, and got {what}")


def _check_inputs(module: nn.Module, inputs: object) -> None:
    remedy = 'pass the keyword arguments of one call, such as example_inputs={"sample": latents}'
    if not isinstance(inputs, Mapping):
        raise ConfigError(f"example_inputs is of type {type(inputs).__name__}; {remedy}")
    try:
        inspect.signature(module.forward).bind(**inputs)
    except TypeError as error:
        raise ConfigError(f"example_inputs do not fit {type(module).__name__}.forward ({error}); {remedy}") from error
