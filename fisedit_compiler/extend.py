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

An operation without a rewrite rule runs densely, and ``explain()`` says so; ``examples/third_party_op.py`` gives one
its rules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from fisedit_compiler.errors import ConfigError
from fisedit_compiler.graph.layout import Layout, opaque
from fisedit_compiler.graph.layout_rules import LAYOUT_RULES, LayoutRule
from fisedit_compiler.graph.specs import ValueSpec, has_spec, spec_of
from fisedit_compiler.inspect.costs import COSTS, CostRule, elements
from fisedit_compiler.passes.base import GraphPass, Pass, Program, Rewriter, Slot, slot_name
from fisedit_compiler.passes.rewrites.extensions import RULES, RewriteRule
from fisedit_compiler.passes.rewrites.rowwise import copy_on_rows

__all__ = [
    "GraphPass",
    "Layout",
    "Pass",
    "Program",
    "Rewriter",
    "Slot",
    "ValueSpec",
    "copy_on_rows",
    "cost_rule",
    "elements",
    "has_spec",
    "layout_rule",
    "opaque",
    "rewrite_rule",
    "slot_name",
    "spec_of",
]

_Rule = TypeVar("_Rule", bound=Callable[..., Any])


def layout_rule(operation: Any) -> Callable[[LayoutRule], LayoutRule]:
    """Register what the layout of an operation's result is, where its shape does not tell.

    The rule gets the node and the layout inferred from its shape (a :class:`Layout`), and returns a layout of the same
    rank. A result of ``opaque(rank, reason)`` keeps the operation, and what reads it, dense for that reason.

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


def cost_rule(operation: Any) -> Callable[[CostRule], CostRule]:
    """Register what an operation costs, for ``explain()`` and the page of ``fisedit inspect``.

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
    return _register(operation, COSTS, "cost rule")


def _register(operation: Any, rules: dict[Any, Any], what: str) -> Callable[[_Rule], _Rule]:
    if not isinstance(operation, torch._ops.OpOverload):
        raise ConfigError(
            f"A {what} is for one operation, such as torch.ops.mylib.scale.default; got {operation!r}"
            + (" (name its overload: .default)" if isinstance(operation, torch._ops.OpOverloadPacket) else "")
            + "."
        )

    def register(rule: _Rule) -> _Rule:
        known = rules.setdefault(operation, rule)
        if (known.__module__, known.__qualname__) != (rule.__module__, rule.__qualname__):
            raise ConfigError(
                f"{operation} has a {what} already: {known.__module__}.{known.__qualname__}. Register one of them."
            )
        rules[operation] = rule  # the same rule again: its module was reloaded
        return rule

    return register
