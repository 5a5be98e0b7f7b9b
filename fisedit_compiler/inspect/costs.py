"""FLOPs and bytes of graphs, as sympy expressions in ``b, h, w, t`` (text tokens), ``n_s`` and ``m_s``.

FLOPs are those of products (convolutions, linear layers, matrix products, attention), two for a multiplication with
its addition, as ``torch.utils.flop_counter`` counts them. Bytes are what kernels that are not fused with one another
would move at least: every tensor that an operation reads, once, and what it writes; views move nothing. So a compiled
step moves fewer bytes, and the larger of the two is no promise of a time.

Sizes that only a site plan knows are symbols, too: ``n_s``, the active sites of level ``s``; ``m_s``, the outputs that
its convolutions compute (``n_s`` rounded up to whole blocks); and for every ring and table of taps its number of
entries. :func:`plan_sizes` gives all of them for a plan. What an operation costs is among its traits
(``kernels/traits.py``); here it is added up. No table and no text is made here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

from fisedit_compiler.errors import ConfigError
from fisedit_compiler.geometry.site_plan import SitePlan
from fisedit_compiler.graph import ir
from fisedit_compiler.graph.inputs import Sources, TableInput, input_of
from fisedit_compiler.graph.sizes import BATCH, HEIGHT, TEXT, WIDTH, in_blocks, row_symbol
from fisedit_compiler.graph.specs import ValueSpec, has_spec, nbytes, spec_of
from fisedit_compiler.kernels.traits import Formula, traits_of

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


# -- nodes ---------------------------------------------------------------------------------------


def node_cost(node: fx.Node, specs: Specs | None = None) -> Cost:
    """What one call node costs by its operation's traits; nothing for sizes and views.

    Args:
        node: of a captured, lowered or hoisted graph.
        specs: of placeholders that carry none, by name (see :func:`placeholder_specs`).

    Raises:
        ConfigError: a formula of another package gave no cost.
    """
    known = specs or {}
    out = node.meta.get("spec")
    if node.op != "call_function" or "expr" in node.meta or out is None:
        return Cost()
    traits = traits_of(node.target)
    arguments = list(fx.map_arg(node.args, lambda argument: _spec(argument, known)))
    flops = ZERO if traits.flops is None else traits.flops(arguments, out)
    moved = None if traits.bytes is None else traits.bytes(arguments, out)
    if moved is None:
        moved = _operands(node, known) + sum(map(nbytes, _values(out)), ZERO)
    uncounted = () if traits.flops is not None else (ir.target_name(node.target),)
    return Cost(_number(flops, traits.flops, node), _number(moved, traits.bytes, node), uncounted)


def _number(found: Any, formula: Formula | None, node: fx.Node) -> sympy.Expr:
    try:
        return sympy.sympify(found, strict=True)
    except sympy.SympifyError:
        name = f"{getattr(formula, '__module__', '')}.{getattr(formula, '__qualname__', formula)}"
        raise ConfigError(
            f"The cost rule {name} gave {found!r} for {ir.describe(node)}; it must give FLOPs, or FLOPs and bytes, as "
            "numbers or sympy expressions in the shapes of its arguments."
        ) from None


def _operands(node: fx.Node, known: Specs) -> sympy.Expr:
    """Bytes of what a node reads, every operand once."""
    read = (_spec(argument, known) for argument in node.all_input_nodes)
    return sum((nbytes(spec) for value in read if value is not None for spec in _values(value)), ZERO)


def _values(value: Any) -> tuple[ValueSpec, ...]:
    return value if isinstance(value, tuple) else (value,)


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


def _spec(node: fx.Node, known: Specs) -> Any:
    spec = known.get(node.name, node.meta.get("spec")) if node.op == "placeholder" else node.meta.get("spec")
    return _table_spec(node, spec) if spec is not None else None


def _table_spec(node: fx.Node, spec: Any) -> Any:
    """The spec of a ring or table of taps, whose sizes differ from one to the next, by the symbol of its entries."""
    return ValueSpec((_entries(node.name),), spec.dtype) if _varies_in_size(table_of(node)) else spec


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
        values[in_blocks(symbol)] = rows if size == 1 else plan.block_count(level, size) * size**2
    for node in step.nodes:
        table = table_of(node)
        if table is not None and _varies_in_size(table):
            values[_entries(node.name)] = table.of(Sources(plan=plan)).numel()
    return values


def table_of(node: fx.Node) -> TableInput | None:
    """The site plan's table that an input of a step stands for; ``None`` for any other node."""
    item = input_of(node)
    return item if isinstance(item, TableInput) else None


def _varies_in_size(table: TableInput | None) -> bool:
    return table is not None and table.table in ("ring", "taps")


def placeholder_specs(captured: fx.Graph, graphs: Iterable[fx.Graph]) -> dict[str, ValueSpec]:
    """Specs of call inputs and of hoisted values by name, for bundles, whose placeholders carry none."""
    inputs = [node for node in captured.nodes if node.op == "placeholder"]
    computed = [node for graph in graphs for node in graph.nodes if node.op == "call_function"]
    return {node.name: spec_of(node) for node in (*inputs, *computed) if has_spec(node)}


def _entries(table: str) -> sympy.Symbol:
    return sympy.Symbol(table, nonnegative=True, integer=True)
