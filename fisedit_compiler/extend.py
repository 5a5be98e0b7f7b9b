"""Adding to the compiler from outside: passes, layout rules and rewrites of other packages' operations.

A pass is a class given to ``SparsifyConfig(extra_passes=[...])``: :class:`Pass` rewrites one node at a time,
:class:`GraphPass` goes through the graph as it likes. Rules are for single operations and are registered once, by
decorator, when the module that brings the operation is imported:

    @layout_rule(torch.ops.mylib.window_sum.default)
    def windows_mix_sites(node, inferred):
        return opaque(inferred.rank, "a window sum reads the neighbours")

    @rewrite_rule(torch.ops.mylib.scale_tokens.default)
    def scale_rows(node, rewriter):
        copy_on_rows(node, {node.args[0]: rewriter.rows(node.args[0])}, rewriter)

    @cost_rule(torch.ops.mylib.scale_tokens.default)
    def scale_costs(arguments, result):
        return elements(result.shape)

An operation without a rewrite rule runs densely, and ``explain()`` says so. What else the compiler should know of one
are its traits (:class:`OpTraits`), costs among them: :func:`op_traits` gives them to an operation that exists,
:func:`define_op` to one that a package defines together with the kernels that compute it:

    define_op(
        "mylib::scale_tokens(Tensor tokens, Tensor gain) -> Tensor", reference, fake,
        traits=OpTraits(flops=scale_costs, reads_whole=True),
        providers=[Provider("triton", "CUDA", kernel, supports=half_precision)],
    )

A value that is recorded in another form than the compiler's own is a :class:`SlotKind`: how it is stored, what readers
get of it, what an edit writes. A rewrite asks for the value by it:

    @register_slot_kind
    class Halved(Canvas):
        name = "mylib.halved"
        holds = "else"
        ...

    recorded = rewriter.canvas(tokens, slot_name(node, "tokens"), node, kind=Halved())

Whether it keeps what a kind promises (``docs/contracts.md``) is tried when a program is compiled.

``examples/third_party_op.py`` does all of it for two operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import wraps
from typing import Any, TypeVar

import torch

from fisedit_compiler.errors import ConfigError
from fisedit_compiler.graph.axis_roles import Batch, Channel, Joined, Sites
from fisedit_compiler.graph.layout import Layout, opaque
from fisedit_compiler.graph.layout_rules import LAYOUT_RULES, LayoutRule
from fisedit_compiler.graph.specs import ValueSpec, elements, has_spec, nbytes, spec_of
from fisedit_compiler.kernels.guarded import guarded
from fisedit_compiler.kernels.providers import Provider, half_precision
from fisedit_compiler.kernels.registry import Op
from fisedit_compiler.kernels.registry import define_op as _define_op
from fisedit_compiler.kernels.traits import TRAITS, Formula, OpTraits, Update, no_products, traits_of
from fisedit_compiler.passes.base import GraphPass, Pass, Program, Rewriter, slot_name
from fisedit_compiler.passes.rewrites.extensions import RULES, RewriteRule
from fisedit_compiler.passes.rewrites.rowwise import copy_on_rows
from fisedit_compiler.slots.base import LoadedNode, Slot, SlotKind, SlotNode
from fisedit_compiler.slots.canvas import Canvas
from fisedit_compiler.slots.dense import Dense
from fisedit_compiler.slots.registry import register_slot_kind
from fisedit_compiler.slots.row_form import RowForm
from fisedit_compiler.slots.turn import Edit
from fisedit_compiler.slots.written import Written, WrittenRows

__all__ = [
    "Batch",
    "Canvas",
    "Channel",
    "Dense",
    "Edit",
    "GraphPass",
    "Joined",
    "Layout",
    "LoadedNode",
    "OpTraits",
    "Pass",
    "Program",
    "Provider",
    "Rewriter",
    "RowForm",
    "Sites",
    "Slot",
    "SlotKind",
    "SlotNode",
    "Update",
    "ValueSpec",
    "Written",
    "WrittenRows",
    "copy_on_rows",
    "cost_rule",
    "define_op",
    "elements",
    "half_precision",
    "has_spec",
    "layout_rule",
    "nbytes",
    "no_products",
    "op_traits",
    "opaque",
    "register_slot_kind",
    "rewrite_rule",
    "slot_name",
    "spec_of",
]

_Rule = TypeVar("_Rule", bound=Callable[..., Any])


def layout_rule(operation: Any) -> Callable[[LayoutRule], LayoutRule]:
    """Register what the layout of an operation's result is, where its shape does not tell.

    The rule gets the node and the layout inferred from its shape (a :class:`Layout`), and returns a layout of the same
    rank: that one, or one of other roles, such as ``Layout((Batch(), Sites(level), Channel()))`` for tokens. A result
    of ``opaque(rank, reason)`` keeps the operation, and what reads it, dense for that reason.

    Args:
        operation: ``torch.ops.<namespace>.<name>.<overload>``.

    Raises:
        ConfigError: it is no such operation, or has a rule already.
    """
    return _register(operation, LAYOUT_RULES, "layout rule")


def rewrite_rule(operation: Any) -> Callable[[RewriteRule], RewriteRule]:
    """Register how an operation is computed on rows.

    The rule gets the node and a :class:`Rewriter`. It replaces the node (``rewriter.replace(node, rows)`` or
    ``copy_on_rows``) and returns ``None``, or returns why the operation must stay dense. It is asked for nodes whose
    result is a map or tokens and depends on a spatial input.

    Args:
        operation: ``torch.ops.<namespace>.<name>.<overload>``.

    Raises:
        ConfigError: it is no such operation, or has a rule already.
    """
    return _register(operation, RULES, "rewrite rule")


def cost_rule(operation: Any) -> Callable[[Formula], Formula]:
    """Register what an operation costs, for ``explain()`` and the page of ``fisedit inspect``: two of its traits.

    The rule gets the operation's arguments, with a :class:`ValueSpec` (sympy shape, dtype) in place of every tensor,
    and the spec of its result (a tuple of them for several). It returns FLOPs, two for a multiplication with its
    addition, as a number or a sympy expression in these shapes; :func:`elements` multiplies a shape out. The same rule
    serves the dense operation and the one on rows, whose shapes have ``n_s`` in them. Bytes are those of all operands
    and results once, unless the rule returns ``(FLOPs, bytes)``. Without a rule only bytes are counted, and
    ``explain()`` says so.

    Args:
        operation: ``torch.ops.<namespace>.<name>.<overload>``.

    Raises:
        ConfigError: it is no such operation, or has a rule already.
    """
    _check_operation(operation, "A cost rule")

    def register(rule: Formula) -> Formula:
        known = TRAITS.get(operation, OpTraits()).flops
        if known is not None:
            _check_same(operation, "cost rule", known, rule)

        @wraps(rule)
        def flops(arguments: list[Any], result: Any) -> Any:
            return _pair(rule(arguments, result))[0]

        @wraps(rule)
        def moved(arguments: list[Any], result: Any) -> Any:
            return _pair(rule(arguments, result))[1]

        TRAITS[operation] = replace(traits_of(operation), flops=flops, bytes=moved)
        return rule

    return register


def _pair(found: Any) -> tuple[Any, Any]:
    """FLOPs and bytes; ``None`` for the bytes of all operands and results."""
    return found if isinstance(found, tuple) and len(found) == 2 else (found, None)


def op_traits(operation: Any, traits: OpTraits) -> None:
    """Register what else the compiler should know of an operation that exists.

    Args:
        operation: ``torch.ops.<namespace>.<name>.<overload>``.
        traits: they stand in place of all that is known of it, also where PyTorch's tags say something.

    Raises:
        ConfigError: it is no such operation, or has traits already (a cost rule is some).
    """
    _check_operation(operation, "Traits")
    known = TRAITS.setdefault(operation, traits)
    if _names(known) != _names(traits):
        raise ConfigError(f"{operation} has traits already: {known}. Register one of them.")
    TRAITS[operation] = traits  # the same again: their module was reloaded


def define_op(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    traits: OpTraits,
    providers: Sequence[Provider] = (),
) -> Op:
    """Define an operation of another package together with its traits and the kernels that compute it.

    It is registered with ``torch.library`` and the dispatcher like the compiler's own. For every dispatch key the first
    provider runs that supports the operands, else the reference; ``explain()`` shows which, and why others are passed
    over. A name defined twice keeps its first definition.

    Args:
        schema: such as ``"mylib::scale(Tensor tokens, Tensor gain) -> Tensor"``.
        reference: what it means, in plain PyTorch; it runs on every device, and never returns a view of an argument.
        fake: gives an empty tensor of the result's shape, dtype and strides; sizes may be symbolic.
        traits: costs, and how it gets along with others.
        providers: kernels, those to prefer first.

    Returns:
        The operation; calling it dispatches, and ``.overload`` is what rules are registered for.

    Raises:
        ConfigError: the name has no namespace, or the compiler's or PyTorch's; the schema, a function or a provider is
            none.
    """
    namespace, _, name = schema.partition("(")[0].rpartition("::")
    if not namespace or namespace in ("fisedit", "aten", "prims"):
        raise ConfigError(
            f"An operation needs the namespace of its package, such as mylib::{name}(...); got {schema!r}."
        )
    qualified = f"{namespace}::{name}"
    _check_parts(qualified, reference, fake, traits, providers)
    try:
        named = [guarded(provider, qualified, fake) for provider in providers]
        return _define_op(schema, reference, fake, traits=traits, providers=named)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{qualified} cannot be defined: {reason}. Mend {schema!r} or its providers.") from error


def _check_parts(op: str, reference: object, fake: object, traits: object, providers: Sequence[object]) -> None:
    functions: dict[str, object] = {"reference": reference, "fake": fake}
    for provider in providers:
        if not isinstance(provider, Provider):
            raise ConfigError(f"{op}: its providers have {provider!r}, which is no fisedit_compiler.extend.Provider.")
        functions[f"kernel of provider {provider.name!r}"] = provider.kernel
        if provider.supports is not None:
            functions[f"supports of provider {provider.name!r}"] = provider.supports
    for what, function in functions.items():
        if not callable(function):
            raise ConfigError(f"{op}: its {what} is {function!r}, and must be a function.")
    if not isinstance(traits, OpTraits):
        raise ConfigError(f"{op}: its traits are {traits!r}, and must be an OpTraits.")


def _register(operation: Any, rules: dict[Any, Any], what: str) -> Callable[[_Rule], _Rule]:
    _check_operation(operation, f"A {what}")

    def register(rule: _Rule) -> _Rule:
        _check_same(operation, what, rules.setdefault(operation, rule), rule)
        rules[operation] = rule  # the same rule again: its module was reloaded
        return rule

    return register


def _check_operation(operation: Any, what: str) -> None:
    if not isinstance(operation, torch._ops.OpOverload):
        be = "are" if what.endswith("s") else "is"
        raise ConfigError(
            f"{what} {be} for one operation, such as torch.ops.mylib.scale.default; got {operation!r}"
            + (" (name its overload: .default)" if isinstance(operation, torch._ops.OpOverloadPacket) else "")
            + "."
        )


def _check_same(operation: Any, what: str, known: Any, rule: Any) -> None:
    if _name(known) != _name(rule):
        raise ConfigError(f"{operation} has a {what} already: {_name(known)}. Register one of them.")


def _names(traits: OpTraits) -> list[Any]:
    """Traits with their functions by name, since a module that is reloaded has new functions."""
    values = (getattr(traits, field.name) for field in fields(traits))
    return [_name(value) if callable(value) else value for value in values]


def _name(function: Any) -> str:
    return f"{function.__module__}.{getattr(function, '__qualname__', function)}"
