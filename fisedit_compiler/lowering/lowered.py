"""The graph that Inductor gets: a step graph after the three stages of lowering, each of which shows as a stage.

Before:   the step (or update) graph of a program, which is what runs where nothing is lowered
Staged:   ring rows are brought along, keys, values and site sums are found by address (``stage.py``)
Cut:      products of few rows are computed in parts (``cut_products.py``)
Repeated: blocks of equal structure are calls of one region, which is compiled once (``repeated.py``)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import fx

from fisedit_compiler.lowering.cut_products import cut_products
from fisedit_compiler.lowering.repeated import outline_repeated
from fisedit_compiler.lowering.stage import stage
from fisedit_compiler.passes.instruments import Instruments

Lowerable = Literal["step", "update", "reuse.full", "reuse.full_update", "reuse.shallow", "reuse.shallow_update"]
"""The graphs of a program that are lowered, by name."""

LOWERABLE: tuple[Lowerable, ...] = ("step", "update")
"""Those of every program."""
CUT: tuple[Lowerable, ...] = ("reuse.full", "reuse.full_update", "reuse.shallow", "reuse.shallow_update")
"""Those of a program whose step is cut."""


def lowered_graph(name: Lowerable, graph: fx.Graph, slots: Sequence[str], instruments: Instruments) -> fx.Graph:
    """Lower a graph of a program, which stays as it is.

    Args:
        name: which it is; its stages are called after it.
        graph: the graph.
        slots: names of all slots of the program, in order.
        instruments: told about the stages.
    """
    stage_name = name.removeprefix("reuse.")
    with instruments.made(f"{stage_name}_staged", graph, stage_name) as made:
        made.graph = lowered = stage(graph, slots)
    with instruments.watch(f"{stage_name}_cut", lowered):
        cut_products(lowered)
    with instruments.made(f"{stage_name}_repeated", lowered, f"{stage_name}_cut") as made:
        made.graph = repeated = outline_repeated(lowered)
    return repeated
