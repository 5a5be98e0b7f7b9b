"""How an op of the ``fisedit::`` namespace is defined: schema, reference, fake.

The reference is plain PyTorch. It *is* the meaning of the op, the oracle of faster kernels and the CPU path,
so it is registered for every backend (``CompositeExplicitAutograd``); a kernel takes over one dispatch key.
No op lives here, and no kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fisedit_compiler.errors import FiseditError

NAMESPACE = "fisedit"
# A library unregisters its ops when it is collected, hence one that lives as long as the module.
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_OPS: dict[str, Op] = {}


class KernelError(FiseditError, ValueError):
    """An op was called with tensors whose shapes or dtypes contradict each other."""


@dataclass(frozen=True)
class Op:
    """One op: its name and schema, what it means, its shape function, and the callable that dispatches."""

    name: str
    schema: str
    reference: Callable[..., torch.Tensor]
    fake: Callable[..., torch.Tensor]
    overload: Any

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        result: torch.Tensor = self.overload(*args, **kwargs)
        return result


def define_op(schema: str, reference: Callable[..., torch.Tensor], fake: Callable[..., torch.Tensor]) -> Op:
    """Define ``fisedit::<name>`` from its schema, e.g. ``"pack(Tensor weight) -> Tensor"``.

    ``torch.library.Library`` rather than ``torch.library.custom_op``: at a few hundred calls per step the
    latter's wrapper is a measurable part of an eager step. A name defined twice keeps its first definition.

    Args:
        schema: signature in the schema language of ``torch.library``; an op that mutates must say so here.
        reference: plain-PyTorch implementation, never returning a view of an argument.
        fake: shape function; must hold for symbolic sizes and give the strides that the reference gives.
    """
    name = schema.partition("(")[0]
    if name in _OPS:
        return _OPS[name]
    # The references accept any strides, so the compiler need not copy an argument to keep the traced ones.
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
    _LIBRARY.define(schema, tags=tags)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    _OPS[name] = Op(name, schema, reference, fake, overload)
    return _OPS[name]


def provide(name: str, dispatch_key: str, kernel: Callable[..., torch.Tensor]) -> None:
    """Let ``kernel`` compute ``fisedit::<name>`` on one backend; it must match the op's reference."""
    _LIBRARY.impl(name, kernel, dispatch_key)


def registered_ops() -> dict[str, Op]:
    """Every op defined so far, by name."""
    return dict(_OPS)


def require(condition: bool, op: str, message: Callable[[], str]) -> None:
    """Raise ``KernelError`` unless ``condition``; only for sizes that are static under symbolic tracing."""
    if not condition:
        raise KernelError(f"{NAMESPACE}::{op}: {message()}")
