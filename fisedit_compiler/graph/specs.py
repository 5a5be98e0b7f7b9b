"""What a tensor of a graph is: its shape in sympy expressions, and its dtype; how many elements and bytes that is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch import fx


@dataclass(frozen=True)
class ValueSpec:
    """Shape (sympy expressions in ``b, h, w, n_s``) and dtype of one tensor."""

    shape: tuple[sympy.Expr, ...]
    dtype: torch.dtype

    @property
    def rank(self) -> int:
        return len(self.shape)


def spec_of(node: fx.Node) -> ValueSpec:
    """The spec of a single-tensor node."""
    spec = node.meta["spec"]
    assert isinstance(spec, ValueSpec), f"{node.name} is not a single tensor"
    return spec


def has_spec(argument: Any) -> bool:
    """Whether ``argument`` is a node that stands for one tensor."""
    return isinstance(argument, fx.Node) and isinstance(argument.meta.get("spec"), ValueSpec)


def elements(shape: Iterable[sympy.Expr]) -> sympy.Expr:
    """Number of elements of a shape."""
    return _elements(tuple(shape))


@lru_cache(maxsize=4096)
def _elements(shape: tuple[sympy.Expr, ...]) -> sympy.Expr:
    return sympy.Mul(*shape)


def nbytes(spec: ValueSpec) -> sympy.Expr:
    """Bytes of a value."""
    return elements((sympy.Integer(spec.dtype.itemsize), *spec.shape))
