"""How an op of the ``fisedit::`` namespace is defined: schema, reference, fake, traits, providers.

The reference is plain PyTorch. It *is* the meaning of the op, the oracle of faster kernels and the CPU path,
so it is registered for every backend (``CompositeExplicitAutograd``); a provider takes over one dispatch key.
No op lives here, and no kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fisedit_compiler.errors import FiseditError
from fisedit_compiler.kernels.providers import Provider, kernels_by_key
from fisedit_compiler.kernels.traits import TRAITS, OpTraits, describe

NAMESPACE = "fisedit"
# A library unregisters its ops when it is collected, hence libraries that live as long as the module.
_LIBRARIES: dict[str, torch.library.Library] = {}
_OPS: dict[str, Op] = {}
_BY_OVERLOAD: dict[Any, Op] = {}


class KernelError(FiseditError, ValueError):
    """An op was called with tensors whose shapes or dtypes contradict each other."""


@dataclass(frozen=True)
class Op:
    """One op: its name and schema, what it means, its shape function, what else is known of it, its kernels.

    Calling it dispatches; one with several results is called by its overload.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    overload: Any
    traits: OpTraits
    providers: tuple[Provider, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        result: torch.Tensor = self.overload(*args, **kwargs)
        return result

    def implementation(self, dispatch_key: str) -> Callable[..., Any]:
        """What the dispatcher runs for a key."""
        return kernels_by_key(self.providers, self.reference).get(dispatch_key, self.reference)


def define_op(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    traits: OpTraits,
    providers: Sequence[Provider] = (),
) -> Op:
    """Define ``fisedit::<name>`` from its schema, e.g. ``"pack(Tensor weight) -> Tensor"``.

    ``torch.library.Library`` rather than ``torch.library.custom_op``: at a few hundred calls per step the
    latter's wrapper is a measurable part of an eager step. A name defined twice keeps its first definition.

    Args:
        schema: signature in the schema language of ``torch.library``; an op that mutates must say so here. A name with
            a namespace (``"mylib::pack(...)"``) is another package's (``fisedit_compiler.extend``).
        reference: plain-PyTorch implementation, never returning a view of an argument.
        fake: shape function; must hold for symbolic sizes and give the strides that the reference gives.
        traits: costs, and how it gets along with others.
        providers: kernels that compute it in the reference's place, those to prefer first.
    """
    qualified, _, signature = schema.partition("(")
    namespace, _, name = qualified.rpartition("::")
    namespace = namespace or NAMESPACE
    qualified = f"{namespace}::{name}"
    if qualified in _OPS:
        return _OPS[qualified]
    if namespace not in _LIBRARIES:
        _LIBRARIES[namespace] = torch.library.Library(namespace, "FRAGMENT")
    library = _LIBRARIES[namespace]
    # The references accept any strides, so the compiler need not copy an argument to keep the traced ones.
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
    library.define(f"{name}({signature}", tags=tags)
    library.impl(name, reference, "CompositeExplicitAutograd")
    for key, kernel in kernels_by_key(providers, reference).items():
        library.impl(name, kernel, key)
    torch.library.register_fake(qualified, fake, lib=library)
    overload = getattr(getattr(torch.ops, namespace), name).default
    op = Op(name, schema, reference, fake, overload, traits, tuple(providers))
    _OPS[qualified] = _BY_OVERLOAD[overload] = op
    if namespace == NAMESPACE:
        describe({overload: traits})
    else:
        TRAITS[overload] = traits
    return op


def registered_ops() -> dict[str, Op]:
    """Every ``fisedit::`` op defined so far, by name."""
    return {op.name: op for qualified, op in _OPS.items() if qualified.startswith(f"{NAMESPACE}::")}


def op_of(target: Any) -> Op | None:
    """The op behind a call's target; ``None`` if it was not defined here."""
    return _BY_OVERLOAD.get(target)


def require(condition: bool, op: str, message: Callable[[], str]) -> None:
    """Raise ``KernelError`` unless ``condition``; only for sizes that are static under symbolic tracing."""
    if not condition:
        raise KernelError(f"{NAMESPACE}::{op}: {message()}")
