"""What the compiler must know of an operation besides what it computes: its costs, and how it gets along with others.

Every op of this package says it in its own file (``define_op(..., traits=OpTraits(...))``), PyTorch's own operations in
``aten.py``, those of other packages through ``fisedit_compiler.extend``. Other files ask :func:`traits_of` and have no
tables of operations by their costs, their fusion or their updates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch

from fisedit_compiler.graph.registered import rule_table

Formula = Callable[[list[Any], Any], Any]
"""A number or sympy expression from an operation's arguments, a :class:`~fisedit_compiler.graph.specs.ValueSpec` in
place of every tensor, and the spec of its result (a tuple of them for several)."""


def no_products(arguments: list[Any], result: Any) -> sympy.Expr:
    """FLOPs of an operation that multiplies no matrices."""
    return sympy.Integer(0)


def nothing_moved(arguments: list[Any], result: Any) -> sympy.Expr:
    """Bytes of a view."""
    return sympy.Integer(0)


@dataclass(frozen=True)
class Update:
    """A recorded value that an edit brings up to date by running an operation.

    Attributes:
        recorded: which argument is the recorded value.
        new: which argument has the new rows of the active sites; ``None`` if the operation's result replaces the value.
            What is kept of rows is the slot kind's business.
    """

    recorded: int
    new: int | None


@dataclass(frozen=True)
class OpTraits:
    """An operation, as far as passes, lowering and ``explain()`` ask.

    Attributes:
        flops: of its products, two for a multiplication with its addition; ``None``: unknown, ``explain()`` names the
            operation as uncounted. :func:`no_products` for what has none.
        bytes: what a kernel of its own would move; ``None``, or a formula that gives ``None``: all operands and results
            once.
        inline: the operation in plain PyTorch, which Inductor compiles in its place and can fuse with its neighbours,
            unless a provider takes the operands; ``None``: it stays one call.
        reads_whole: a linear layer that it reads, or a view of one, is computed in one piece: it cannot add up parts
            while it reads.
        regroups: its result is its first argument, with other axes or a part of it, so whoever reads the one reads the
            other.
        updates: the recorded arguments that an edit which is itself recorded writes back.
    """

    flops: Formula | None = None
    bytes: Formula | None = None
    inline: Callable[..., Any] | None = None
    reads_whole: bool = False
    regroups: bool = False
    updates: tuple[Update, ...] = ()


TRAITS: dict[Any, OpTraits] = rule_table()
"""Of other packages' operations, and what they say of others; this comes before what this package says."""
_OWN: dict[Any, OpTraits] = {}

_UNKNOWN = OpTraits()
_VIEW = OpTraits(flops=no_products, bytes=nothing_moved)
_POINTWISE = OpTraits(flops=no_products)


def describe(traits: Mapping[Any, OpTraits]) -> None:
    """Register what this package says of operations (``torch._ops.OpOverload`` or functions)."""
    _OWN.update(traits)


def traits_of(target: Any) -> OpTraits:
    """The traits of a call's target; where nobody gave any, what its schema and tags tell."""
    known = TRAITS.get(target) or _OWN.get(target)
    return known or by_schema(target)


def inlined() -> dict[Any, Callable[..., Any]]:
    """What Inductor may take apart, with what it compiles instead."""
    return {target: traits.inline for target, traits in {**_OWN, **TRAITS}.items() if traits.inline is not None}


def by_schema(target: Any) -> OpTraits:
    """What PyTorch says of an operation itself: views move nothing, pointwise operations have no products."""
    if not isinstance(target, torch._ops.OpOverload):
        return _UNKNOWN
    if not target._schema.is_mutable and any(result.alias_info is not None for result in target._schema.returns):
        return _VIEW
    return _POINTWISE if torch.Tag.pointwise in target.tags else _UNKNOWN


def regrouping(target: Any) -> OpTraits:
    """The traits of an operation that only regroups or reorders axes, or takes a part."""
    return replace(by_schema(target), regroups=True)
