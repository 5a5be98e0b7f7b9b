"""Views and permutations on tensors: an axis called sites holds these sites, and rows are moved as values are.

Chains of views and permutations are drawn at random: windows, grids of strides, batches behind sites, channels folded
into the batch, columns before rows. No plain reshape may change the order of packed elements unseen.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from fisedit_compiler.config import SparsifyConfig
from fisedit_compiler.graph import ir
from fisedit_compiler.graph.layout import Layout
from fisedit_compiler.graph.layout_rules import LayoutRules
from fisedit_compiler.graph.sizes import BATCH, HEIGHT, WIDTH
from fisedit_compiler.graph.specs import ValueSpec, spec_of
from fisedit_compiler.passes.base import Program
from fisedit_compiler.passes.rewrites.pointwise import Pointwise
from fisedit_compiler.passes.rewrites.views import Permute, View

aten = torch.ops.aten
MULTIPLE = 4
SIZES = {BATCH: 3, HEIGHT: 2, WIDTH: 5}
ROWS, COLUMNS = MULTIPLE * SIZES[HEIGHT], MULTIPLE * SIZES[WIDTH]
SAMPLE = (BATCH, sympy.Integer(4), MULTIPLE * HEIGHT, MULTIPLE * WIDTH)
Shape = tuple[sympy.Expr, ...]


class Chain:
    """A graph of moves, one after another, beginning at ``[b, 4, 4*h, 4*w]``."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.node = self.graph.placeholder("x")
        self.node.meta.update(spec=ValueSpec(SAMPLE, torch.float32), varies=True)

    @property
    def shape(self) -> Shape:
        return spec_of(self.node).shape

    def view(self, *shape: sympy.Expr | int) -> Chain:
        return self._append(aten.reshape.default, [tuple(map(sympy.sympify, shape))], tuple(map(sympy.sympify, shape)))

    def permute(self, *order: int) -> Chain:
        return self._append(aten.permute.default, [list(order)], tuple(self.shape[axis] for axis in order))

    def relu(self) -> Chain:
        return self._append(aten.relu.default, [], self.shape)

    def _append(self, target: Any, args: list[Any], shape: Shape) -> Chain:
        self.node = ir.call(self.graph, target, (self.node, *args), spec=ValueSpec(shape, torch.float32))
        self.node.meta.update(varies=True, origin=self.node.name)
        return self

    def layouts(self) -> dict[fx.Node, Layout]:
        if not any(node.op == "output" for node in self.graph.nodes):
            self.graph.output(self.node)
        LayoutRules(MULTIPLE).annotate(self.graph)
        return {node: node.meta["layout"] for node in self.graph.nodes if "spec" in node.meta}


class OnTensors(fx.Interpreter):
    """Runs a chain, or what the passes made of one; markers mean what ``ir.py`` says."""

    def __init__(self, graph: fx.Graph, active: Tensor, recorded: dict[str, Tensor]) -> None:
        super().__init__(torch.nn.Module(), graph=graph)
        self.active, self.recorded = active, recorded
        self.values: dict[str, Tensor] = {}

    def sites(self, layout: Layout) -> Tensor:
        assert layout.level is not None and layout.level.denominator == 1
        factor = int(layout.level)
        coarse = self.active.view(ROWS // factor, factor, COLUMNS // factor, factor).any(3).any(1)
        return coarse.flatten().nonzero().flatten()

    def run_node(self, n: fx.Node) -> Any:
        args = [concrete(argument) if isinstance(argument, tuple) else argument for argument in n.args]
        values = fx.node.map_arg(args, lambda node: self.env[node])
        if n.target is ir.load:
            result = self.recorded[str(n.args[0])]
        elif n.target is ir.pack:
            layout = n.args[0].meta["layout"]  # type: ignore[union-attr]
            result = layout.packed.gather(values[0], self.sites(layout))
        elif n.target is ir.unpack:
            layout = n.meta["layout"]
            result = layout.packed.write(values[1], self.sites(layout), values[0])
        elif n.op == "call_function":
            result = n.target(*values)  # type: ignore[operator]
        else:
            result = super().run_node(n)
        self.values[n.name] = result
        return result


def concrete(shape: Sequence[Any]) -> list[int]:
    return [int(sympy.sympify(size).subs(SIZES)) for size in shape]


def dense(graph: fx.Graph, x: Tensor) -> dict[str, Tensor]:
    """Every value of a chain."""
    run = OnTensors(graph, torch.ones(ROWS, COLUMNS, dtype=torch.bool), {})
    run.run(x)
    return run.values


def mislabelled(chain: Chain) -> list[str]:
    """Values whose layout calls an element a site's that is not: found by moving the number of every site."""
    layouts = chain.layouts()
    numbers = torch.arange(ROWS * COLUMNS).view(1, 1, ROWS, COLUMNS).expand(concrete(SAMPLE))
    values, found = dense(chain.graph, numbers), []
    for node, layout in layouts.items():
        if layout.is_rows:
            assert layout.level is not None and layout.level.denominator == 1, node
            factor = int(layout.level)
            row, column = values[node.name] // COLUMNS // factor, values[node.name] % COLUMNS // factor
            due = layout.spread(torch.arange(ROWS * COLUMNS // factor**2).view(ROWS // factor, COLUMNS // factor))
            if not torch.equal(row * (COLUMNS // factor) + column, due.expand_as(row)):
                found.append(f"{node.name} {list(spec_of(node).shape)} is {layout}")
    return found


def moved_as_values_are(chain: Chain) -> bool:
    """Whether the chain on rows gives what it gives on whole values, for an edit of some sites."""
    layouts = chain.layouts()
    generator = torch.Generator().manual_seed(0)
    active = torch.rand(ROWS, COLUMNS, generator=generator) < 0.3
    base = torch.randn(concrete(SAMPLE), generator=generator)
    edit = torch.where(active, torch.randn(concrete(SAMPLE), generator=generator), base)
    captured = SimpleNamespace(
        graph=chain.graph, multiple=MULTIPLE, signature=SimpleNamespace(spatial_names=[next(iter(layouts)).name])
    )
    for node in layouts:
        node.meta["origin"] = node.name
    program = Program(captured, ir.copy_graph(chain.graph), SparsifyConfig(cache=False))  # type: ignore[arg-type]
    for rewrite in (Permute, View, Pointwise):
        rewrite().run(program)
    recorded = dense(chain.graph, base)
    slots = {name: recorded[slot.origin] for name, slot in program.slots.items()}
    result = OnTensors(program.graph, active, slots).run(edit)
    return torch.equal(result, dense(chain.graph, edit)[chain.node.name])


b, h, w = BATCH, HEIGHT, WIDTH
H, W, S = 4 * h, 4 * w, 16 * h * w
CHAINS: dict[str, tuple[Chain, list[str]]] = {
    "windows": (Chain().view(b, 4, h, 4, w, 4).permute(0, 2, 4, 3, 5, 1).relu(), ["opaque", "map@4", "map@4"]),
    "windows as tokens": (
        Chain().view(b, 4, h, 4, w, 4).permute(0, 2, 4, 3, 5, 1).view(b, h * w, 16, 4).relu(),
        ["opaque", "map@4", "tokens@4", "tokens@4"],
    ),
    "windows in the batch and back": (
        Chain().view(b, 4, h, 4, w, 4).permute(0, 2, 4, 3, 5, 1).view(b * h * w, 16, 4).relu()
        .view(b, h, w, 4, 4, 4).permute(0, 5, 1, 3, 2, 4).view(*SAMPLE).relu(),
        ["opaque", "map@4", "opaque", "opaque", "map@4", "map@4", "opaque", "map@1"],
    ),
    "a grid of strides": (
        Chain().view(b, 4, 4, h, 4, w).permute(0, 2, 4, 3, 5, 1).relu(), ["opaque", "opaque", "opaque"]
    ),
    "a grid and back": (
        Chain().view(b, 4, 4, h, 4, w).permute(0, 2, 4, 3, 5, 1).relu().permute(0, 5, 1, 3, 2, 4).view(*SAMPLE).relu(),
        ["opaque", "opaque", "opaque", "opaque", "map@1", "map@1"],
    ),
    "samples between sites": (
        Chain().permute(2, 3, 0, 1).view(S * b, 4).view(b, S, 4).relu(), ["map@1", "opaque", "opaque", "opaque"]
    ),
    "samples between sites and back": (
        Chain().permute(2, 3, 0, 1).view(S * b, 4).view(b, S, 4).relu().view(H, W, b, 4).relu(),
        ["map@1", "opaque", "opaque", "opaque", "map@1", "map@1"],
    ),
    "columns before rows": (
        Chain().permute(0, 1, 3, 2).view(b, 4, S).relu(), ["map@1", "opaque", "opaque"]
    ),
    "channels in the batch": (Chain().view(4 * b, 1, H, W).relu().view(*SAMPLE), ["opaque", "map@1", "opaque"]),
    "channels in front of the batch": (
        Chain().permute(1, 0, 2, 3).view(4 * b, H, W).relu().view(4, b, S).permute(1, 2, 0),
        ["map@1", "map@1", "map@1", "tokens@1", "tokens@1"],
    ),
    "the batch cut in two behind channels": (
        Chain().permute(1, 2, 3, 0).view(2, 2, S, b).view(2, 2 * S * b), ["map@1", "tokens@1", "opaque"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_moves_that_models_make(name: str) -> None:
    chain, kinds = CHAINS[name]
    layouts = list(chain.layouts().values())[1:]
    assert [layout.kind if layout.kind == "opaque" else str(layout) for layout in layouts] == kinds
    assert all(layout.reason for layout in layouts if layout.kind == "opaque")
    assert not mislabelled(chain)
    assert moved_as_values_are(chain)


@st.composite
def chains(draw: st.DrawFn, merges: bool = True) -> Chain:
    """Axes cut, merged and reordered, with a pointwise operation here and there."""
    chain = Chain()
    for _ in range(draw(st.integers(1, 6))):
        shape, rank = chain.shape, len(chain.shape)
        move = draw(st.sampled_from(["cut", "cut", "permute", "permute", "relu", *["merge"] * merges]))
        axis = draw(st.integers(0, rank - 1))
        if move == "cut" and rank < 7:
            factors = [f for f in (sympy.Integer(2), h, w, b, h * w) if (shape[axis] / f).as_numer_denom()[1] == 1]
            if factors:
                parts = draw(st.permutations([f := draw(st.sampled_from(factors)), shape[axis] / f]))
                chain.view(*shape[:axis], *parts, *shape[axis + 1 :])
        elif move == "merge" and axis + 1 < rank:
            chain.view(*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])
        elif move == "permute":
            chain.permute(*draw(st.permutations(range(rank))))
        elif move == "relu":
            chain.relu()
    return chain.relu()


@settings(max_examples=150, deadline=None)
@given(chain=chains())
def test_no_axis_is_called_sites_that_holds_others(chain: Chain) -> None:
    assert not mislabelled(chain)


@settings(max_examples=100, deadline=None)
@given(chain=chains())
def test_rows_are_moved_as_values_are(chain: Chain) -> None:
    assert moved_as_values_are(chain)


@settings(max_examples=60, deadline=None)
@given(chain=chains(merges=False))
def test_a_way_back_is_found(chain: Chain) -> None:
    """Every cut and permutation undone in turn: the sites are where they were, and known to be."""
    moves = [node for node in chain.graph.nodes if node.op == "call_function"]
    for node in reversed(moves):
        before = spec_of(node.args[0]).shape
        if node.target is aten.permute.default:
            order: list[int] = node.args[1]
            chain.permute(*(order.index(axis) for axis in range(len(order))))
        elif node.target is aten.reshape.default:
            chain.view(*before)
    chain.relu()
    layouts = chain.layouts()
    assert str(layouts[chain.node]) == "map@1"
    assert layouts[chain.node].level == Fraction(1) and not mislabelled(chain)
