"""The compiler's view of a graph: what a value is, and the marker operations passes speak in.

A graph under rewriting is an ordinary ``torch.fx.Graph`` of functional ATen. Each tensor node carries
``meta["spec"]`` (a :class:`ValueSpec`: sympy shape and dtype) and, once inferred, ``meta["layout"]``. We keep our own
specs instead of re-executing under fake tensors after every pass: re-execution with symbolic shapes costs 10-20 ms
a node (SD2.1: half a minute a pass), while every rewrite knows the shape of what it writes.

Four *markers* stand for what is decided during rewriting and lowered once at the end (``passes/lower.py``):

``pack(value)``            dense value -> rows of the active sites
``unpack(rows, base)``     rows -> dense value, inactive sites from ``base``
``load(slot)``             a recorded value
``site_table(kind, key)``  an index table of the site plan

No rewriting and no layout rule lives here.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import sympy
import torch
from torch import fx

from fisedit_compiler.errors import LayoutError

BATCH = sympy.Symbol("b", positive=True, integer=True)
HEIGHT = sympy.Symbol("h", positive=True, integer=True)
WIDTH = sympy.Symbol("w", positive=True, integer=True)
TEXT = sympy.Symbol("t", positive=True, integer=True)


def row_symbol(level: Fraction) -> sympy.Symbol:
    """The symbol of ``N_s``, the number of active sites of ``level``."""
    return sympy.Symbol(f"n_{level_name(level)}", nonnegative=True, integer=True)


def level_name(level: Fraction) -> str:
    """``2`` for half resolution, ``1over2`` for double: usable inside identifiers."""
    return str(level.numerator) if level.denominator == 1 else f"{level.numerator}over{level.denominator}"


@dataclass(frozen=True)
class ValueSpec:
    """Shape (sympy expressions in ``b, h, w, n_s``) and dtype of one tensor."""

    shape: tuple[sympy.Expr, ...]
    dtype: torch.dtype

    @property
    def rank(self) -> int:
        return len(self.shape)


def pack(value: Any) -> Any:
    """Marker: rows of the active sites of a dense value."""
    raise NotImplementedError("markers are lowered before a graph runs")


def unpack(rows: Any, base: Any) -> Any:
    """Marker: a dense value whose active sites are ``rows`` and whose other sites are ``base``."""
    raise NotImplementedError("markers are lowered before a graph runs")


def load(slot: str) -> Any:
    """Marker: the recorded value of a slot."""
    raise NotImplementedError("markers are lowered before a graph runs")


def site_table(kind: str, key: Any) -> Any:
    """Marker: an index table of the site plan (``active``, ``inverse``, ``places``, ``ring`` or ``taps``)."""
    raise NotImplementedError("markers are lowered before a graph runs")


MARKERS = (pack, unpack, load, site_table)


def spec_of(node: fx.Node) -> ValueSpec:
    """The spec of a single-tensor node."""
    spec = node.meta["spec"]
    assert isinstance(spec, ValueSpec), f"{node.name} is not a single tensor"
    return spec


def has_spec(argument: Any) -> bool:
    """Whether ``argument`` is a node that stands for one tensor."""
    return isinstance(argument, fx.Node) and isinstance(argument.meta.get("spec"), ValueSpec)


def path_of(node: fx.Node) -> str:
    """Dotted path of the module in the user's model that produced ``node``."""
    return str(node.meta.get("path", ""))


def describe(node: fx.Node) -> str:
    """Where a node comes from, for error messages: operation, module path and source line."""
    place = path_of(node) or "the top module"
    source = node.meta.get("source")
    return f"{node.name} = {target_name(node.target)} in {place}" + (f" ({source})" if source else "")


def target_name(target: Any) -> str:
    """Readable name of an fx target: ``aten.silu`` for ``aten.silu.default``."""
    if isinstance(target, torch._ops.OpOverload):
        text = str(target)
        return text.removesuffix(".default")
    return getattr(target, "__name__", str(target))


def inherit(node: fx.Node, source: fx.Node) -> None:
    """Give a new node the provenance (module path, source line, origin) of the node it replaces."""
    for key in ("path", "source", "origin"):
        if key in source.meta:
            node.meta.setdefault(key, source.meta[key])


def stand_for(rows: fx.Node, node: fx.Node) -> None:
    """Note in ``rows.meta["stands_for"]`` that ``rows`` are those of the dense node behind ``node``.

    The names there are of captured nodes: what ``compiled.check()`` compares the rows with.
    """
    origins = [*rows.meta.get("stands_for", ()), *node.meta.get("stands_for", ())]
    if "origin" in node.meta:
        origins.append(node.meta["origin"])
    rows.meta["stands_for"] = tuple(dict.fromkeys(origins))


def call(
    graph: fx.Graph,
    target: Any,
    args: Sequence[Any],
    *,
    spec: ValueSpec | tuple[ValueSpec, ...] | None = None,
    source: fx.Node | None = None,
    name: str | None = None,
) -> fx.Node:
    """Append a call at the graph's insertion point, with spec and provenance."""
    node = graph.create_node("call_function", target, tuple(args), {}, name=name)
    if spec is not None:
        node.meta["spec"] = spec
    if source is not None:
        inherit(node, source)
    return node


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


def unused_name(graph: fx.Graph, name: str) -> str:
    """``name``, or it with a number behind it: placeholders of equal names would be one argument twice."""
    taken = {str(node.target) for node in graph.nodes if node.op == "placeholder"}
    candidates = (name, *(f"{name}_{number}" for number in range(1, len(taken) + 1)))
    return next(candidate for candidate in candidates if candidate not in taken)


def nodes_calling(graph: fx.Graph, targets: Iterable[Any]) -> list[fx.Node]:
    """All call nodes of the given targets, in graph order."""
    wanted = set(targets)
    return [node for node in graph.nodes if node.op == "call_function" and node.target in wanted]
