"""Reuse across steps: cut a step where coarser levels come up, so that a call may take them from an earlier one.

Before: ``return conv_out(blocks(cat(upsampled(coarse(x)), skip(x))))``
Full:   ``return conv_out(...), upsampled(...)``            the same, which also returns the rows at the cut
Shallow: ``return conv_out(blocks(cat(held, skip(x))))``    the rows are an input; nothing of coarser levels is left

The cut is found in the captured graph. A value is *deep* if it lies on a coarser level than the finest, or if
everything spatial that it is computed from is deep. The cut are the deep values that others read: in a UNet the output
of the last upsampler, which is joined with a skip connection of the finest level. A model without such a place offers
no cut, and the reason is kept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import fx

from fisedit_compiler.errors import VerificationError
from fisedit_compiler.graph import ir
from fisedit_compiler.graph.inputs import CallInput, HeldInput, input_of, placeholder, slot_of
from fisedit_compiler.graph.layout import Layout
from fisedit_compiler.graph.sizes import row_symbol
from fisedit_compiler.graph.specs import ValueSpec
from fisedit_compiler.passes.instruments import Instruments
from fisedit_compiler.passes.programs.recording import SlotUpdate
from fisedit_compiler.slots.base import Slot


@dataclass(frozen=True)
class CutValue:
    """One value at the cut.

    Attributes:
        origin: the captured node that computes it.
        path: the module of the user's model that it comes from.
        node: the step's node that computes its rows.
        level: whose sites they are of.
        dim: the axis of the rows that counts sites.
    """

    origin: str
    path: str
    node: str
    level: Fraction
    dim: int


@dataclass(frozen=True)
class Cut:
    """Where a step can be cut.

    Attributes:
        values: what crosses, in order of computation; rows that a full call returns and a shallow one is given.
        sources: the recorded values that they are computed from: how far these move tells how far the cut does.
        deep: the slots of deep values, which a shallow call neither reads nor computes.
    """

    values: tuple[CutValue, ...]
    sources: tuple[str, ...]
    deep: frozenset[str]

    @property
    def place(self) -> str:
        """Where it is, in words."""
        return ", ".join(value.path or value.origin for value in self.values)


@dataclass(frozen=True)
class ReuseGraphs:
    """The graphs of a cut step; as ``step`` and ``update`` of the program, whose hoisted values they read.

    Attributes:
        full: the step; returns the rows at the cut last.
        shallow: the step from the cut on; its outputs alone.
        full_update: ``update``; returns the rows at the cut last.
        shallow_update: ``update`` from the cut on; returns the outputs, then ``updates``.
        updates: what ``shallow_update`` returns behind the outputs.
    """

    full: fx.Graph
    shallow: fx.Graph
    full_update: fx.Graph
    shallow_update: fx.Graph
    updates: tuple[SlotUpdate, ...]


def find_cut(captured: fx.Graph, step: fx.Graph, slots: Mapping[str, Slot]) -> Cut | str:
    """The cut of a program, or why there is none, as a part of a sentence.

    Args:
        captured: the dense graph, with layouts.
        step: the hoisted step graph.
        slots: of the program, by name.
    """
    levels = {node: level for node in captured.nodes if (level := _level(node)) is not None}
    if len(set(levels.values())) < 2:
        return "all of its maps have one size, so nothing comes up from coarser levels"
    finest = min(levels.values())
    deep = _deep(captured, levels, finest)
    origins = [node for node in captured.nodes if node in deep and any(_is_shallow(user, deep) for user in node.users)]
    if not origins:
        return "nothing of its finest level meets what comes up from coarser levels"
    values = []
    for node in origins:
        if node in _outputs(captured):
            return f"its output {node.name} is computed from coarser levels alone"
        if levels.get(node) != finest:
            return f"its finest level reads {ir.describe(node)}, which has no sites of that level"
        rows = next((other for other in step.nodes if node.name in other.meta.get("stands_for", ())), None)
        spec, sites = None if rows is None else rows.meta.get("spec"), row_symbol(finest)
        if rows is None or rows.op != "call_function" or not isinstance(spec, ValueSpec) or sites not in spec.shape:
            return f"{ir.describe(node)}, where coarser levels come up, is computed densely"
        values.append(CutValue(node.name, ir.path_of(node), rows.name, finest, spec.shape.index(sites)))
    names = {node.name for node in deep} - {value.origin for value in values}
    packed = {name for name, slot in slots.items() if slot.kind.holds == "packed" and slot.origin in names}
    nodes = {node.name: node for node in step.nodes}
    sources = tuple(dict.fromkeys(name for value in values for name in _sources(nodes[value.node], packed)))
    if not sources:
        return f"nothing is recorded of what {ir.describe(origins[0])} is computed from"
    return Cut(tuple(values), sources, frozenset(name for name, slot in slots.items() if slot.origin in names))


def _level(node: fx.Node) -> Fraction | None:
    layout = node.meta.get("layout")
    return layout.level if isinstance(layout, Layout) and node.meta.get("varies") else None


def _deep(graph: fx.Graph, levels: Mapping[fx.Node, Fraction], finest: Fraction) -> set[fx.Node]:
    deep: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "output" or not node.meta.get("varies"):
            continue
        spatial = [source for source in node.all_input_nodes if source.meta.get("varies")]
        if levels.get(node, finest) > finest or (spatial and all(source in deep for source in spatial)):
            deep.add(node)
    return deep


def _is_shallow(node: fx.Node, deep: Collection[fx.Node]) -> bool:
    return node.op == "output" or (bool(node.meta.get("varies")) and node not in deep)


def _outputs(graph: fx.Graph) -> list[fx.Node]:
    return next(node for node in graph.nodes if node.op == "output").all_input_nodes


def _sources(node: fx.Node, packed: Collection[str]) -> list[str]:
    """The nearest recorded values before a node of the step."""
    waiting, seen = [node], {node}
    while waiting:
        found = [slot_of(source) for each in waiting for source in each.all_input_nodes if slot_of(source) in packed]
        if found:
            return found
        before = [source for each in waiting for source in each.all_input_nodes if source not in seen]
        seen.update(before)
        waiting = before
    return []


def reuse_graphs(
    step: fx.Graph, update: fx.Graph, updates: Sequence[SlotUpdate], cut: Cut, instruments: Instruments
) -> ReuseGraphs:
    """Cut the graphs of a program.

    Args:
        step: its step graph.
        update: its update graph.
        updates: what ``update`` returns behind the outputs.
        cut: where.
        instruments: told about every graph.

    Raises:
        VerificationError: a graph from the cut on still reads what is recorded of coarser levels.
    """
    outputs = len(_flat(update)) - len(updates)
    kept = tuple(number for number, changed in enumerate(updates) if changed.slot not in cut.deep)
    made = {}
    for name, graph, source in (("full", step, "step"), ("full_update", update, "update")):
        with instruments.made(name, graph, source) as stage:
            stage.graph = made[name] = _full(graph, cut)
    everything = range(outputs)
    for name, graph, source, places in (
        ("shallow", step, "step", [*everything]),
        ("shallow_update", update, "update", [*everything, *(outputs + number for number in kept)]),
    ):
        with instruments.made(name, graph, source) as stage:
            stage.graph = made[name] = _shallow(graph, cut, places)
    return ReuseGraphs(**made, updates=tuple(updates[number] for number in kept))


def _full(graph: fx.Graph, cut: Cut) -> fx.Graph:
    """The graph with the rows at the cut as its last outputs."""
    copy = ir.copy_graph(graph)
    nodes = {node.name: node for node in copy.nodes}
    _return(copy, [*_flat(copy), *(nodes[value.node] for value in cut.values)])
    copy.lint()
    return copy


def _shallow(graph: fx.Graph, cut: Cut, places: Iterable[int]) -> fx.Graph:
    """The graph from the cut on, with some of its outputs."""
    copy = ir.copy_graph(graph)
    nodes = {node.name: node for node in copy.nodes}
    last = [node for node in copy.nodes if node.op == "placeholder"][-1]
    for value in cut.values:
        with copy.inserting_after(last):
            name = ir.unused_name(copy, f"held_{value.origin}")
            last = held = placeholder(copy, name, HeldInput(value.origin, value.dim))
        rows = nodes[value.node]
        held.meta.update({key: rows.meta[key] for key in ("spec", "path", "source", "origin") if key in rows.meta})
        rows.replace_all_uses_with(held)
    flat = _flat(copy)
    _return(copy, [flat[place] for place in places])
    copy.eliminate_dead_code()
    for node in reversed(list(copy.nodes)):
        if not node.users and (node.op == "get_attr" or _may_go(node)):
            copy.erase_node(node)
    read = {slot_of(node) for node in copy.nodes} & cut.deep
    if read:
        raise VerificationError(
            f"reuse: {sorted(read)} of coarser levels are read behind the cut. This is a defect here."
        )
    copy.lint()
    return copy


def _may_go(node: fx.Node) -> bool:
    return node.op == "placeholder" and not isinstance(input_of(node), CallInput)


def _flat(graph: fx.Graph) -> list[Any]:
    output = next(node for node in graph.nodes if node.op == "output").args[0]
    return list(output) if isinstance(output, (list, tuple)) else [output]


def _return(graph: fx.Graph, values: list[Any]) -> None:
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = (tuple(values),)
