"""Sizes of a graph: the symbols ``b, h, w, t``, ``n_s`` and ``m_s``, and their expressions written as nodes."""

from __future__ import annotations

import operator
from fractions import Fraction
from typing import Any

import sympy
import torch
from torch import fx

from fisedit_compiler.errors import LayoutError
from fisedit_compiler.graph.specs import has_spec, spec_of

BATCH = sympy.Symbol("b", positive=True, integer=True)
HEIGHT = sympy.Symbol("h", positive=True, integer=True)
WIDTH = sympy.Symbol("w", positive=True, integer=True)
TEXT = sympy.Symbol("t", positive=True, integer=True)


def row_symbol(level: Fraction) -> sympy.Symbol:
    """The symbol of ``N_s``, the number of active sites of ``level``."""
    return sympy.Symbol(f"n_{level_name(level)}", nonnegative=True, integer=True)


def in_blocks(rows: sympy.Expr) -> sympy.Symbol:
    """``m_s`` for ``n_s``: the outputs that convolutions compute, the active sites rounded up to whole blocks."""
    return sympy.Symbol("m_" + str(rows).removeprefix("n_"), nonnegative=True, integer=True)


def level_name(level: Fraction) -> str:
    """``2`` for half resolution, ``1over2`` for double: usable inside identifiers."""
    return str(level.numerator) if level.denominator == 1 else f"{level.numerator}over{level.denominator}"


class SizeBuilder:
    """Writes sizes (sympy expressions in ``b, h, w``) as graph nodes computed from the spatial input's own sizes.

    Sums, products, powers, quotients rounded down, remainders and extrema of them; any other size must be an axis of an
    input, as the length of a text is. ``multiple`` is ``k``: the spatial input has ``k*h`` by ``k*w`` sites.

    Raises:
        LayoutError: a size is none of these.
    """

    def __init__(self, graph: fx.Graph, spatial: fx.Node, multiple: int) -> None:
        self.graph, self.spatial, self.multiple = graph, spatial, multiple
        self._nodes: dict[sympy.Expr, fx.Node] = {}

    def __call__(self, expression: sympy.Expr | int) -> int | fx.Node:
        expression = sympy.sympify(expression)
        if expression.is_Integer:
            return int(expression)
        if expression not in self._nodes:
            self._nodes[expression] = self._build(expression)
        return self._nodes[expression]

    def _append(self, target: Any, args: tuple[Any, ...], expression: sympy.Expr) -> fx.Node:
        anchor = self.spatial
        for argument in args:
            if isinstance(argument, fx.Node) and argument > anchor:
                anchor = argument
        with self.graph.inserting_after(self._after_placeholders(anchor)):
            node = self.graph.create_node("call_function", target, args)
        node.meta["expr"] = expression
        return node

    def _after_placeholders(self, anchor: fx.Node) -> fx.Node:
        while anchor.next.op in ("placeholder", "get_attr"):
            anchor = anchor.next
        return anchor

    def _build(self, expression: sympy.Expr) -> fx.Node:
        size = torch.ops.aten.sym_size.int
        if expression == BATCH:
            return self._append(size, (self.spatial, 0), expression)
        if expression in (HEIGHT, WIDTH):
            full = self._append(size, (self.spatial, 2 if expression == HEIGHT else 3), self.multiple * expression)
            if self.multiple == 1:
                return full
            return self._append(operator.floordiv, (full, self.multiple), expression)
        if isinstance(expression, (sympy.Mul, sympy.Add)):
            function = operator.mul if isinstance(expression, sympy.Mul) else operator.add
            first, *rest = (self(term) for term in expression.args)
            done = expression.args[0]
            result: int | fx.Node = first
            for term, node in zip(expression.args[1:], rest, strict=True):
                done = done * term if function is operator.mul else done + term
                result = self._append(function, (result, node), done)
            assert isinstance(result, fx.Node)
            return result
        if isinstance(expression, sympy.Pow) and expression.exp.is_Integer and expression.exp > 0:
            base = self(expression.base)
            result = base
            for power in range(2, int(expression.exp) + 1):
                result = self._append(operator.mul, (result, base), expression.base**power)
            assert isinstance(result, fx.Node)
            return result
        if isinstance(expression, sympy.floor):
            numerator, denominator = expression.args[0].as_numer_denom()
            return self._append(operator.floordiv, (self(numerator), self(denominator)), expression)
        if isinstance(expression, sympy.Mod):
            return self._append(operator.mod, tuple(self(term) for term in expression.args), expression)
        if isinstance(expression, (sympy.Max, sympy.Min)):
            return self._extremum(expression)
        for node in self.graph.nodes:
            if node.op == "placeholder" and has_spec(node) and expression in spec_of(node).shape:
                return self._append(size, (node, spec_of(node).shape.index(expression)), expression)
        raise LayoutError(
            f"A size of this model is {expression}, which cannot be computed from the sizes of a call. Pass that size "
            "in, or sparsify the submodule that does not need it."
        )

    def _extremum(self, expression: sympy.Expr) -> fx.Node:
        function: Any = torch.sym_max if isinstance(expression, sympy.Max) else torch.sym_min
        first, *rest = (self(term) for term in expression.args)
        done, result = expression.args[0], first
        for term, node in zip(expression.args[1:], rest, strict=True):
            done = expression.func(done, term)
            result = self._append(function, (result, node), done)
        assert isinstance(result, fx.Node)
        return result
