"""Kernels that compute an op in its reference's place: which one runs, and why others are passed over.

A provider stands for one dispatch key of PyTorch, so the dispatcher chooses by device and nothing here is asked twice.
Among those of one key the first that supports the operands runs; if none does, the reference runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

REFERENCE = "reference"
"""What explanations call the op's own plain-PyTorch implementation."""

ROUNDED = "tensor cores would round this dtype to tf32; the kernel takes float16 and bfloat16"
"""Why kernels on tensor cores pass over float32, which on a GPU is for comparing, and float64."""


@dataclass(frozen=True)
class Provider:
    """A kernel for one backend; it must match the op's reference.

    Attributes:
        name: such as ``triton``, for ``explain()``.
        dispatch_key: of PyTorch's dispatcher, such as ``CUDA``.
        kernel: takes the op's arguments.
        supports: takes the op's arguments and gives ``True``, or in a few words why it passes them over. It is asked
            before every call, so it builds no sentence and looks at dtypes, shapes and strides only. ``explain()``
            asks with contiguous ``meta`` tensors. ``None``: the kernel takes everything.
    """

    name: str
    dispatch_key: str
    kernel: Callable[..., Any]
    supports: Callable[..., Literal[True] | str] | None = None


def half_precision(first: torch.Tensor, *others: object, **options: object) -> Literal[True] | str:
    """``supports`` of kernels on tensor cores: the first operand's dtype decides."""
    return first.dtype in (torch.float16, torch.bfloat16) or ROUNDED


@dataclass(frozen=True)
class Choice:
    """Which implementation computes an op.

    Attributes:
        provider: ``None`` for the reference.
        passed_over: reasons by the names of the providers that come before it.
    """

    provider: Provider | None
    passed_over: Mapping[str, str]

    @property
    def name(self) -> str:
        return REFERENCE if self.provider is None else self.provider.name


def choose(
    providers: Sequence[Provider], device_type: str, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> Choice:
    """What the dispatcher runs on a device for these operands.

    Args:
        providers: an op's, in order.
        device_type: such as ``cuda``; the operands need not lie there.
        args: the op's arguments; ``meta`` tensors will do.
        kwargs: likewise.
    """
    key = torch._C._dispatch_key_for_device(device_type)
    passed_over: dict[str, str] = {}
    for provider in providers:
        if provider.dispatch_key != key:
            passed_over[provider.name] = f"it is for {provider.dispatch_key}, calls run on {device_type}"
            continue
        answer = True if provider.supports is None else provider.supports(*args, **(kwargs or {}))
        if answer is True:
            return Choice(provider, passed_over)
        passed_over[provider.name] = str(answer)
    return Choice(None, passed_over)


def kernels_by_key(providers: Sequence[Provider], reference: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """What is registered with the dispatcher: one function a dispatch key.

    Raises:
        ValueError: two providers have one name.
    """
    names = [provider.name for provider in providers]
    if len(set(names)) < len(names):
        raise ValueError(f"providers of one op need names of their own, got {names}")
    keys = dict.fromkeys(provider.dispatch_key for provider in providers)
    return {key: _first([p for p in providers if p.dispatch_key == key], reference) for key in keys}


def _first(providers: Sequence[Provider], reference: Callable[..., Any]) -> Callable[..., Any]:
    """The first provider that supports its operands, else the reference, with as few calls as that takes."""
    if not providers:
        return reference
    kernel, supports = providers[0].kernel, providers[0].supports
    if supports is None:
        return kernel
    otherwise = _first(providers[1:], reference)

    def run(*args: Any, **kwargs: Any) -> Any:
        return (kernel if supports(*args, **kwargs) is True else otherwise)(*args, **kwargs)

    return run
