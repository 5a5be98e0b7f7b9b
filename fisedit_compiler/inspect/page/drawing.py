"""A sparse program as a drawing: blocks of the model as boxes, their nodes as squares coloured by what they are.

Boxes stand in the order of computation from left to right, each as deep as its level, so a UNet shows as a U. The
drawing is SVG; hovering a square shows its line of the listing, and the page's script adds the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from markupsafe import Markup
from torch import fx

from fisedit_compiler.graph import ir
from fisedit_compiler.graph.inputs import HoistedInput, SlotInput, input_of
from fisedit_compiler.graph.listing import line_of
from fisedit_compiler.graph.specs import ValueSpec
from fisedit_compiler.pages import render

if TYPE_CHECKING:
    from fisedit_compiler.lowering.program import CompiledProgram

KINDS: Mapping[str, tuple[str, str]] = {
    "rows": ("#2b8a3e", "computed on the rows of the active sites"),
    "recorded": ("#1971c2", "read from the recording"),
    "hoisted": ("#9c36b5", "computed once per prompt, timestep or weight"),
    "refused": ("#e03131", "runs densely: no sparse form"),
    "input": ("#f08c00", "input of a call, or table of the mask"),
    "other": ("#adb5bd", "weights, sizes, outputs"),
}
"""Colours and meanings of what a node can be."""

_SQUARE, _MARGIN, _GAP = 14, 8, 26


@dataclass
class Group:
    """The nodes of one block of the model.

    Attributes:
        path: the block's dotted path in the user's model; empty for what belongs to none.
        nodes: in order of computation.
        level: the finest level its rows are at.
    """

    path: str
    nodes: list[fx.Node] = field(default_factory=list)
    level: Fraction = Fraction(1)
    x: float = 0.0
    y: float = 0.0

    @property
    def columns(self) -> int:
        """Squares side by side: boxes are a little taller than wide."""
        return max(math.ceil(0.8 * math.sqrt(len(self.nodes))), 1)

    @property
    def width(self) -> float:
        return self.columns * _SQUARE + 2 * _MARGIN

    @property
    def height(self) -> float:
        return -(-len(self.nodes) // self.columns) * _SQUARE + 2 * _MARGIN


@dataclass(frozen=True)
class Square:
    """One node: its number, its kind, its line of the listing, and its corner."""

    number: int
    kind: str
    line: str
    x: float
    y: float


@dataclass(frozen=True)
class Curve:
    """The values that one block takes from another: an SVG path, wider for more of them, and words about it."""

    path: str
    width: float
    title: str


def draw_program(program: CompiledProgram) -> Markup:
    """The step graph of a program as an SVG document, with a legend."""
    refused = {name for name, *_ in program.refusals}
    nodes = [node for node in program.step.nodes if node.op != "output"]
    numbers = {node: number for number, node in enumerate(nodes)}
    groups = group_nodes(nodes)
    place(groups)
    return render(
        __package__,
        "drawing.svg",
        width=round(max((group.x + group.width for group in groups), default=0.0) + 20),
        height=round(max((group.y + group.height for group in groups), default=0.0) + 60),
        curves=_curves(groups),
        groups=groups,
        squares=lambda group: _squares(group, numbers, refused),
        side=_SQUARE - 2,
        kinds=KINDS,
        legend=_legend(),
    )


def kind_of(node: fx.Node, refused: set[str]) -> str:
    """What a node of a step graph is; one of :data:`KINDS`."""
    if node.op == "placeholder":
        match input_of(node):
            case SlotInput():
                return "recorded"
            case HoistedInput():
                return "hoisted"
        return "input"
    if node.op != "call_function":
        return "other"
    if node.name in refused or node.meta.get("origin") in refused:
        return "refused"
    spec = node.meta.get("spec")
    specs = spec if isinstance(spec, tuple) else (spec,)
    if any(isinstance(item, ValueSpec) and _row_levels(item) for item in specs):
        return "rows"
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "fisedit":
        return "rows"
    return "other"


def group_nodes(nodes: list[fx.Node]) -> list[Group]:
    """Nodes by block of the model, in order of first computation; inputs stand with their first reader."""
    groups: dict[str, Group] = {}
    for node in nodes:
        if node.op == "call_function":
            groups.setdefault(block_of(ir.path_of(node)), Group(block_of(ir.path_of(node))))
    for node in nodes:
        reader = node if node.op == "call_function" else next(iter(node.users), node)
        path = block_of(ir.path_of(reader))
        groups.setdefault(path, Group(path)).nodes.append(node)
    for group in groups.values():
        levels = [level for node in group.nodes for level in _levels(node)]
        group.level = min(levels, default=Fraction(1))
    return list(groups.values())


def block_of(path: str) -> str:
    """The block that a module belongs to: ``down_blocks.0.resnets.1`` of ``down_blocks.0.resnets.1.conv1``."""
    parts = path.split(".")
    for position, part in enumerate(parts):
        if part.isdigit() and position >= 2:
            return ".".join(parts[: position + 1])
    return path


def place(groups: list[Group]) -> None:
    """Give every group its corner."""
    y = dict.fromkeys(sorted({group.level for group in groups}), 0.0)
    bottom = 2.0 * _GAP
    for level in y:
        y[level] = bottom
        bottom += max(group.height for group in groups if group.level == level) + 3 * _GAP
    x = 20.0
    for group in groups:
        group.x, group.y = x, y[group.level]
        x += group.width + _GAP


def _levels(node: fx.Node) -> list[Fraction]:
    spec = node.meta.get("spec")
    specs = spec if isinstance(spec, tuple) else (spec,)
    return [level for item in specs if isinstance(item, ValueSpec) for level in _row_levels(item)]


def _row_levels(spec: ValueSpec) -> list[Fraction]:
    names = (str(symbol) for size in spec.shape for symbol in size.free_symbols)
    return [Fraction(name[2:].replace("over", "/")) for name in names if name.startswith("n_")]


def _curves(groups: list[Group]) -> list[Curve]:
    """One curve per pair of blocks that exchange values."""
    home = {node: group for group in groups for node in group.nodes}
    counts: dict[tuple[int, int], int] = {}
    order = {id(group): number for number, group in enumerate(groups)}
    for group in groups:
        for node in group.nodes:
            for source in node.all_input_nodes:
                origin = home.get(source)
                if origin is not None and origin is not group and source.op == "call_function":
                    key = (order[id(origin)], order[id(group)])
                    counts[key] = counts.get(key, 0) + 1
    curves = []
    for (first, second), count in counts.items():
        a, b = groups[first], groups[second]
        x1, y1, x2, y2 = a.x + a.width, a.y + a.height / 2, b.x, b.y + b.height / 2
        bend = max(abs(x2 - x1) / 2, 20)
        title = f"{count} values from {a.path or 'the top module'} to {b.path or 'the top module'}"
        path = f"M{x1:.0f} {y1:.0f} C{x1 + bend:.0f} {y1:.0f} {x2 - bend:.0f} {y2:.0f} {x2:.0f} {y2:.0f}"
        curves.append(Curve(path, min(1 + count / 3, 5), title))
    return curves


def _squares(group: Group, numbers: Mapping[fx.Node, int], refused: set[str]) -> list[Square]:
    squares = []
    for position, node in enumerate(group.nodes):
        x = group.x + _MARGIN + position % group.columns * _SQUARE
        y = group.y + _MARGIN + position // group.columns * _SQUARE
        squares.append(Square(numbers[node], kind_of(node, refused), line_of(node), x, y))
    return squares


def _legend() -> list[tuple[float, str, str]]:
    """Where an entry starts, its colour and its words."""
    entries, x = [], 20.0
    for name, (colour, meaning) in KINDS.items():
        text = f"{name}: {meaning}"
        entries.append((x, colour, text))
        x += 30 + 6.2 * len(text)
    return entries


def node_facts(program: CompiledProgram) -> list[dict[str, Any]]:
    """Of every square, by its number: its line, its place in the model, the squares it reads and those that read it."""
    nodes = [node for node in program.step.nodes if node.op != "output"]
    numbers = {node: number for number, node in enumerate(nodes)}
    return [
        {
            "line": line_of(node),
            "path": ir.path_of(node),
            "source": node.meta.get("source") or "",
            "in": [numbers[source] for source in node.all_input_nodes],
            "out": [numbers[user] for user in node.users if user in numbers],
        }
        for node in nodes
    ]
