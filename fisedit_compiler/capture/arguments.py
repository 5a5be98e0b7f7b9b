"""From the arguments of a call to its signature: bound by name, flattened to tensor leaves and constants, signed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from fractions import Fraction
from operator import is_
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fisedit_compiler.errors import CaptureError
from fisedit_compiler.graph.signatures import CallSignature, TensorSpec

Leaf = tuple[str, Any]


def bind(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], fixed: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of a call by name, without those left at their default; ``fixed`` overrides.

    ``**kwargs``-style parameters are spread by name.

    Raises:
        CaptureError: the forward takes ``*args``, whose members have no names.
    """
    signature = _signature(module.forward)
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


def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    """The signature of a method; that of a function is looked up, as every call of a run asks for the same one."""
    function = getattr(forward, "__func__", None)
    parts = _parts(function)
    if parts is None:
        return inspect.signature(forward)
    assert isinstance(function, FunctionType)
    known = _signatures.get(function)
    if known is None or len(known[0]) != len(parts) or not all(map(is_, known[0], parts)):
        known = _signatures[function] = parts, inspect.signature(forward)
    return known[1]


def _parts(function: Any) -> list[Any] | None:
    """What the signature of a function is made of, anybody may exchange it; ``None`` if that is not known."""
    parts: list[Any] = []
    for _ in range(_WRAPPERS):
        if type(function) is not FunctionType:
            return None
        own, named = vars(function), function.__kwdefaults__ or {}
        parts += (function.__code__, function.__defaults__, *named, *named.values(), own.get("__signature__"))
        if "__wrapped__" not in own:
            return parts
        function = own["__wrapped__"]
    return None


_WRAPPERS = 8
"""Functions that wrap each other, at most, of which a signature is kept."""
_signatures: WeakKeyDictionary[FunctionType, tuple[list[Any], inspect.Signature]] = WeakKeyDictionary()


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


# Arguments of known models whose first axis is the batch even in a batch of one. Models that are guided by an embedding
# (`timestep_cond`), or not at all, are run so.
_BATCHED = ("encoder_hidden_states", "added_cond_kwargs.text_embeds", "added_cond_kwargs.time_ids", "class_labels")
_BATCHED_LIKE_THE_SAMPLE = ("timestep_cond", "encoder_attention_mask")
_BATCHED_LISTS = ("added_cond_kwargs.image_embeds.",)


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
    if sizes and (name in _BATCHED or (sizes[0] == batch and (batch > 1 or _is_batched(name)))):
        sizes[0] = "b"
    if name == "encoder_hidden_states" and len(sizes) == 3:
        sizes[1] = "t"
    return TensorSpec(name, tensor.dtype, tuple(sizes))


def _is_batched(name: str) -> bool:
    return name in _BATCHED_LIKE_THE_SAMPLE or name.startswith(_BATCHED_LISTS)
