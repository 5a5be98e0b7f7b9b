"""FLOPs and bytes of graphs, as sympy expressions in ``b, h, w, t`` (text tokens), ``n_s`` and ``m_s``.

FLOPs are those of products (convolutions, linear layers, matrix products, attention), two for a multiplication with
its addition, as ``torch.utils.flop_counter`` counts them. Bytes are what kernels that are not fused with one another
would move at least: every tensor that an operation reads, once, and what it writes; views move nothing. So a compiled
step moves fewer bytes, and the larger of the two is no promise of a time.

Sizes that only a site plan knows are symbols, too: ``n_s``, the active sites of level ``s``; ``m_s``, the outputs that
its convolutions compute (``n_s`` rounded up to whole blocks); and for every ring and table of taps its number of
entries. :func:`plan_sizes` gives all of them for a plan. No table and no text is made here.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch import fx

from fisedit_compiler.errors import ConfigError
from fisedit_compiler.geometry.site_plan import SitePlan
from fisedit_compiler.graph import ir
from fisedit_compiler.graph.inputs import Sources, TableInput, input_of
from fisedit_compiler.graph.registered import rule_table
from fisedit_compiler.graph.sizes import BATCH, HEIGHT, TEXT, WIDTH, row_symbol
from fisedit_compiler.graph.specs import ValueSpec, has_spec, spec_of

aten = torch.ops.aten
fisedit = torch.ops.fisedit
Values = Mapping[sympy.Symbol, int]
Specs = Mapping[str, ValueSpec]
ZERO = sympy.Integer(0)


@dataclass(frozen=True)
class Cost:
    """What one operation, or a graph of them, costs.

    Attributes:
        flops: floating point operations.
        nbytes: bytes read and written.
        uncounted: names of operations without a formula, whose FLOPs are missing from ``flops``.
    """

    flops: sympy.Expr = ZERO
    nbytes: sympy.Expr = ZERO
    uncounted: tuple[str, ...] = ()

    def at(self, values: Values) -> tuple[int, int]:
        """FLOPs and bytes for given sizes."""
        return evaluate(self.flops, values), evaluate(self.nbytes, values)


# -- FLOPs ---------------------------------------------------------------------------------------

Formula = Callable[[list[Any], ValueSpec], sympy.Expr]
"""FLOPs from an operation's arguments, tensors given as their specs, and the spec of its result."""


def _convolution(args: list[Any], out: ValueSpec) -> sympy.Expr:
    return 2 * elements(out.shape) * elements(args[1].shape[1:])


def _transposed_convolution(args: list[Any], out: ValueSpec) -> sympy.Expr:
    return 2 * elements(args[0].shape) * elements(args[1].shape[1:])


def _product(args: list[Any], out: ValueSpec) -> sympy.Expr:
    return 2 * elements(out.shape) * args[0].shape[-1]


def _added_product(args: list[Any], out: ValueSpec) -> sympy.Expr:
    return _product(args[1:], out)


def _attention(args: list[Any], out: ValueSpec) -> sympy.Expr:
    return _attend(args[0], args[1].shape[-2], out)


def _attention_sites(args: list[Any], out: ValueSpec) -> sympy.Expr:
    return _attend(args[0], args[3].shape[-2], out)


def _attend(query: ValueSpec, keys: sympy.Expr, out: ValueSpec) -> sympy.Expr:
    return 2 * keys * elements(out.shape[:-1]) * (query.shape[-1] + out.shape[-1])


def _convolution_sites(args: list[Any], out: ValueSpec) -> sympy.Expr:
    batch, rows, _ = out.shape
    computed = rows if list(args[7]) == [1, 1] else _in_blocks(rows)
    return 2 * batch * computed * elements(args[5].shape)


FLOPS: dict[Any, Formula] = {
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.conv3d.default: _convolution,
    aten.conv_transpose1d.default: _transposed_convolution,
    aten.conv_transpose2d.input: _transposed_convolution,
    aten.conv_transpose3d.input: _transposed_convolution,
    aten.linear.default: _product,
    aten.matmul.default: _product,
    aten.mm.default: _product,
    aten.bmm.default: _product,
    aten.addmm.default: _added_product,
    aten.baddbmm.default: _added_product,
    aten.scaled_dot_product_attention.default: _attention,
    fisedit.conv2d_sites.default: _convolution_sites,
    fisedit.attention_sites.default: _attention_sites,
    fisedit.attention_rows.default: _attention,
    fisedit.cross_attention.default: _attention,
}
"""Operations made of products. What is in neither table, nor pointwise or a view, counts bytes only, and says so."""

CostRule = Callable[[list[Any], Any], Any]
"""As :data:`Formula`, for operations of other packages: gives FLOPs, or FLOPs and bytes (see ``extend.py``)."""

COSTS: dict[Any, CostRule] = rule_table()
"""Registered rules by operation."""

NO_PRODUCTS = frozenset(
    {
        operator.getitem,
        aten.amax.default,
        aten.amin.default,
        aten.arange.default,
        aten.arange.start,
        aten.arange.start_step,
        aten._softmax.default,
        aten.cat.default,
        aten.concat.default,
        aten.constant_pad_nd.default,
        aten.contiguous.default,
        aten.embedding.default,
        aten.full.default,
        aten.glu.default,
        aten.group_norm.default,
        aten.layer_norm.default,
        aten.mean.default,
        aten.mean.dim,
        aten.ones.default,
        aten.pad.default,
        aten.repeat.default,
        aten.rms_norm.default,
        aten.softmax.int,
        aten.stack.default,
        aten.sum.default,
        aten.sum.dim_IntList,
        aten.upsample_nearest2d.default,
        aten.upsample_nearest2d.vec,
        aten.zeros.default,
        fisedit.gather_sites.default,
        fisedit.group_norm_site_sums.default,
        fisedit.group_norm_sites.default,
        fisedit.group_norm_statistics.default,
        fisedit.pack_conv_weight.default,
        fisedit.recentre_site_sums.default,
        fisedit.scatter_sites.default,
        fisedit.update_statistics.default,
    }
)
"""Operations without products that no tag says so of."""

_MAY_COPY = frozenset({aten.contiguous.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device})
"""Operations that the schema calls views, and that are in a graph because they copy."""


def has_formula(target: Any) -> bool:
    """Whether the FLOPs of an operation are known (most have none)."""
    if target in COSTS or target in FLOPS or target in NO_PRODUCTS or target in _MAY_COPY or _is_view(target):
        return True
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


# -- nodes ---------------------------------------------------------------------------------------


def node_cost(node: fx.Node, specs: Specs | None = None) -> Cost:
    """What one call node costs; nothing for sizes and views.

    Args:
        node: of a captured, lowered or hoisted graph.
        specs: of placeholders that carry none, by name (see :func:`placeholder_specs`).
    """
    known = specs or {}
    out = node.meta.get("spec")
    if node.op != "call_function" or "expr" in node.meta or out is None:
        return Cost()
    if node.target in COSTS:
        return _by_rule(node, out, known)
    uncounted = () if has_formula(node.target) else (ir.target_name(node.target),)
    if node.target is operator.getitem or (_is_view(node.target) and node.target not in _MAY_COPY):
        return Cost(uncounted=uncounted)
    formula, flops = FLOPS.get(node.target), ZERO
    if formula is not None and isinstance(out, ValueSpec):
        flops = formula(list(fx.map_arg(node.args, lambda argument: _spec(argument, known))), out)
    results = out if isinstance(out, tuple) else (out,)
    return Cost(flops, _read(node, known) + sum((nbytes(result) for result in results), ZERO), uncounted)


def _by_rule(node: fx.Node, out: Any, known: Specs) -> Cost:
    rule = COSTS[node.target]
    found = rule(list(fx.map_arg(node.args, lambda argument: _spec(argument, known))), out)
    flops, moved = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    try:
        if moved is None:
            results = out if isinstance(out, tuple) else (out,)
            moved = _read(node, known) + sum((nbytes(result) for result in results), ZERO)
        return Cost(sympy.sympify(flops, strict=True), sympy.sympify(moved, strict=True))
    except sympy.SympifyError:
        raise ConfigError(
            f"The cost rule {rule.__module__}.{rule.__qualname__} gave {found!r} for {ir.describe(node)}; it must give "
            "FLOPs, or FLOPs and bytes, as numbers or sympy expressions in the shapes of its arguments."
        ) from None


def total(costs: Iterable[Cost]) -> Cost:
    """Several costs as one."""
    flops: Counter[sympy.Expr] = Counter()
    moved: Counter[sympy.Expr] = Counter()
    uncounted: dict[str, None] = {}
    for cost in costs:
        flops[cost.flops] += 1
        moved[cost.nbytes] += 1
        uncounted.update(dict.fromkeys(cost.uncounted))
    return Cost(_sum(flops), _sum(moved), tuple(uncounted))


def _sum(terms: Counter[sympy.Expr]) -> sympy.Expr:
    # Most terms occur many times: counting them first is what makes this fast.
    return sympy.expand(sympy.Add(*(term * count for term, count in terms.items())))


def graph_cost(graph: fx.Graph, specs: Specs | None = None) -> Cost:
    """What one run of a graph costs."""
    return total(node_cost(node, specs) for node in graph.nodes)


def elements(shape: Iterable[sympy.Expr]) -> sympy.Expr:
    """Number of elements of a shape."""
    return _elements(tuple(shape))


@lru_cache(maxsize=4096)
def _elements(shape: tuple[sympy.Expr, ...]) -> sympy.Expr:
    return sympy.Mul(*shape)


def nbytes(spec: ValueSpec) -> sympy.Expr:
    """Bytes of a value."""
    return elements((sympy.Integer(spec.dtype.itemsize), *spec.shape))


def _spec(node: fx.Node, known: Specs) -> Any:
    spec = known.get(node.name, node.meta.get("spec")) if node.op == "placeholder" else node.meta.get("spec")
    return _table_spec(node, spec) if spec is not None else None


def _table_spec(node: fx.Node, spec: Any) -> Any:
    """The spec of a ring or table of taps, whose sizes differ from one to the next, by the symbol of its entries."""
    item = input_of(node)
    if isinstance(item, TableInput) and item.table in ("ring", "taps"):
        return ValueSpec((_entries(node.name),), spec.dtype)
    return spec


def _read(node: fx.Node, known: Specs) -> sympy.Expr:
    args = node.args
    read = {argument: _spec(argument, known) for argument in node.all_input_nodes}
    if node.target is fisedit.conv2d_sites.default:
        canvas, ring = read[args[1]], read[args[2]]  # type: ignore[index]
        read[args[1]] = ValueSpec((canvas.shape[0], *ring.shape, canvas.shape[2]), canvas.dtype)  # type: ignore[index]
    elif node.target is fisedit.gather_sites.default:
        read[args[0]] = node.meta["spec"]  # type: ignore[index]
    values = (value if isinstance(value, tuple) else (value,) for value in read.values() if value is not None)
    return sum((nbytes(spec) for value in values for spec in value), ZERO)


def _is_view(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    return any(result.alias_info is not None for result in target._schema.returns)


# -- sizes ---------------------------------------------------------------------------------------


def evaluate(expression: sympy.Expr, values: Values) -> int:
    """An expression as a number.

    Raises:
        ValueError: ``values`` leaves a symbol open.
    """
    result = expression.xreplace({symbol: sympy.Integer(value) for symbol, value in values.items()})
    if result.free_symbols:
        raise ValueError(f"{expression} needs {sorted(map(str, result.free_symbols))} too")
    return int(result)


def call_sizes(multiple: int, height: int, width: int, batch: int, tokens: int) -> dict[sympy.Symbol, int]:
    """The symbols of dense graphs, for a spatial input of ``height`` by ``width`` sites."""
    return {BATCH: batch, HEIGHT: height // multiple, WIDTH: width // multiple, TEXT: tokens}


def plan_sizes(step: fx.Graph, plan: SitePlan) -> dict[sympy.Symbol, int]:
    """The symbols that a site plan decides, for a step graph."""
    values: dict[sympy.Symbol, int] = {}
    for level in plan.active:
        rows, size = plan.rows(level), plan.block_size(level)
        symbol = row_symbol(level)
        values[symbol] = rows
        values[_in_blocks(symbol)] = rows if size == 1 else plan.block_count(level, size) * size**2
    for node in step.nodes:
        item = input_of(node)
        if isinstance(item, TableInput) and item.table in ("ring", "taps"):
            values[_entries(node.name)] = item.of(Sources(plan=plan)).numel()
    return values


def placeholder_specs(captured: fx.Graph, graphs: Iterable[fx.Graph]) -> dict[str, ValueSpec]:
    """Specs of call inputs and of hoisted values by name, for bundles, whose placeholders carry none."""
    inputs = [node for node in captured.nodes if node.op == "placeholder"]
    computed = [node for graph in graphs for node in graph.nodes if node.op == "call_function"]
    return {node.name: spec_of(node) for node in (*inputs, *computed) if has_spec(node)}


def _in_blocks(rows: sympy.Expr) -> sympy.Expr:
    """``m_s`` for ``n_s``."""
    return sympy.Symbol("m_" + str(rows).removeprefix("n_"), nonnegative=True, integer=True)


def _entries(table: str) -> sympy.Symbol:
    return sympy.Symbol(table, nonnegative=True, integer=True)
