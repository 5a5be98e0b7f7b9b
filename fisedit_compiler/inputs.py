"""What a call of the user's module looks like to the compiler: named tensor leaves and constants.

A :class:`CallSignature` says which tensors a call passes (name, rank, dtype, which axes are symbolic) and which plain
values it fixes. One captured program serves every call of the same signature: any batch, height and width.
The registry of known model classes lives here too; everything else is read from an example call.
"""

from __future__ import annotations

import builtins
import inspect
import keyword
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property
from typing import Any

import torch
from torch import nn

from fisedit_compiler.compiling import one_at_a_time
from fisedit_compiler.errors import CaptureError

Leaf = tuple[str, Any]
_RESERVED = frozenset({*dir(builtins), *keyword.kwlist, "device", "inf", "nan", "torch"})


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


def bind(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], fixed: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of a call by name, without those left at their default; ``fixed`` overrides.

    ``**kwargs``-style parameters are spread by name.

    Raises:
        CaptureError: the forward takes ``*args``, whose members have no names.
    """
    signature = inspect.signature(module.forward)
    bound = signature.bind(*args, **kwargs)
    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        parameter = signature.parameters[name]
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(value)
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            raise CaptureError(
                f"{type(module).__name__}.forward takes *{name}: pass its inputs by keyword so that they have names."
            )
        elif value is not parameter.default and not (value is None and parameter.default is None):
            arguments[name] = value
    arguments.update({name: value for name, value in fixed.items() if name in signature.parameters})
    return arguments


def flatten(arguments: Mapping[str, Any]) -> tuple[list[Leaf], list[Leaf]]:
    """Tensor leaves and constant leaves of named arguments, with dotted names in a fixed order."""
    tensors: list[Leaf] = []
    constants: list[Leaf] = []

    def visit(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            tensors.append((name, value))
        elif isinstance(value, Mapping):
            for key in sorted(value):
                visit(f"{name}.{key}", value[key])
        elif isinstance(value, (list, tuple)) and any(isinstance(item, (torch.Tensor, list, dict)) for item in value):
            for index, item in enumerate(value):
                visit(f"{name}.{index}", item)
        else:
            constants.append((name, value))

    for name in sorted(arguments):
        visit(name, arguments[name])
    return tensors, constants


@dataclass(frozen=True)
class TensorSpec:
    """One tensor argument: ``axes[i]`` is ``"b"``, ``"h"``, ``"w"``, ``"t"`` (text tokens) or a fixed size.

    ``level`` is the resolution of a spatial argument relative to the first one (2 is half), 0 for all others.
    """

    name: str
    dtype: torch.dtype
    axes: tuple[str | int, ...]
    level: Fraction = Fraction(0)

    @property
    def is_spatial(self) -> bool:
        return self.level != 0

    def identifier(self) -> str:
        """The name of the graph's placeholder."""
        return identifier(self.name)


def identifier(name: str) -> str:
    """The name of a tensor argument in a graph; torch.fx would rename what hides a builtin, such as ``input``."""
    plain = name.replace(".", "_")
    return f"{plain}_" if plain in _RESERVED else plain


@dataclass(frozen=True)
class CallSignature:
    """What a captured program is specialised on; equal signatures share a program.

    ``tensors`` are sorted by name, ``primary`` names the spatial one that sets height and width.
    """

    tensors: tuple[TensorSpec, ...]
    constants: tuple[tuple[str, str], ...]
    device: str
    primary: str

    @property
    def spatial(self) -> TensorSpec:
        """The spatial tensor that sets height and width."""
        return next(spec for spec in self.tensors if spec.name == self.primary)

    @cached_property
    def sample_name(self) -> str:
        """Placeholder name of that tensor."""
        return self.spatial.identifier()

    @cached_property
    def spatial_names(self) -> tuple[str, ...]:
        """Placeholder names of all spatial tensors, the primary one first."""
        others = [s.identifier() for s in self.tensors if s.is_spatial and s.name != self.primary]
        return (self.sample_name, *others)


def sign(
    arguments: Mapping[str, Any], spatial: tuple[str, ...] | None
) -> tuple[CallSignature, dict[str, torch.Tensor]]:
    """Signature and tensor leaves (by dotted name) of a bound call.

    Raises:
        CaptureError: the call has no spatial input, or ``spatial`` names an argument the call does not have.
    """
    tensors, constants = flatten(arguments)
    chosen = _spatial_names(tensors, spatial)
    primary = dict(tensors)[chosen[0]]
    specs = tuple(_tensor_spec(name, tensor, primary, name in chosen) for name, tensor in tensors)
    texts = tuple((name, repr(value)) for name, value in constants)
    return CallSignature(specs, texts, str(primary.device), chosen[0]), dict(tensors)


def _spatial_names(tensors: list[Leaf], spatial: tuple[str, ...] | None) -> tuple[str, ...]:
    names = [name for name, _ in tensors]
    if spatial is not None:
        found = tuple(name for wanted in spatial for name in names if name == wanted or name.startswith(f"{wanted}."))
        if spatial[0] not in found:
            raise CaptureError(f"Spatial input {spatial[0]!r} is no tensor argument of this call; it has {names}.")
        return found
    found = tuple(name for name, tensor in tensors if tensor.dim() == 4 and tensor.is_floating_point())
    if not found:
        raise CaptureError(
            "The module has no spatial input: none of its tensor arguments is a 4-D floating point map "
            f"[batch, channels, height, width] (arguments: {names}). Sparse editing needs one; name it with "
            "SparsifyConfig(spatial_inputs=(...)) if it has another form."
        )
    return found


# Arguments of known models whose first axis is the batch even in a batch of one.
_BATCHED = ("encoder_hidden_states", "added_cond_kwargs.text_embeds", "added_cond_kwargs.time_ids", "class_labels")


def _tensor_spec(name: str, tensor: torch.Tensor, primary: torch.Tensor, spatial: bool) -> TensorSpec:
    sizes: list[str | int] = [int(size) for size in tensor.shape]
    if spatial:
        if tensor.dim() != 4:
            raise CaptureError(
                f"Spatial input {name} must be [batch, channels, height, width], got {list(tensor.shape)}."
            )
        level = Fraction(int(primary.shape[2]), int(tensor.shape[2]))
        if Fraction(int(primary.shape[3]), int(tensor.shape[3])) != level:
            raise CaptureError(
                f"Spatial input {name} is {tensor.shape[2]}x{tensor.shape[3]}, which is no scaling of "
                f"{primary.shape[2]}x{primary.shape[3]}. "
                "Name the inputs that hold maps in SparsifyConfig(spatial_inputs=...)."
            )
        return TensorSpec(name, tensor.dtype, ("b", sizes[1], "h", "w"), level)
    batch = int(primary.shape[0])
    if sizes and (name in _BATCHED or (batch > 1 and sizes[0] == batch)):
        sizes[0] = "b"
    if name == "encoder_hidden_states" and len(sizes) == 3:
        sizes[1] = "t"
    return TensorSpec(name, tensor.dtype, tuple(sizes))
