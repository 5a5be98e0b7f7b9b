"""Operations that a step on a CPU computes by plain functions, under the names that profilers know them by.

While a profiler runs, a step is run with these functions in ranges of their operations' names. Otherwise nothing asks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import fx

from fisedit_compiler.graph.ir import copy_graph

_OPERATION = "operation"


def compute_by(function: Callable[..., Any], node: fx.Node) -> None:
    """Let a call of an operation be one of a function that computes the same."""
    node.meta[_OPERATION] = node.target._schema.name  # type: ignore[union-attr]
    node.target = function


def with_names(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph for a call that is profiled."""
    named = copy_graph(graph)
    for node in named.nodes:
        if _OPERATION in node.meta:
            node.target = _in_range(node.target, node.meta[_OPERATION])
    return named


def _in_range(function: Any, name: str) -> Callable[..., Any]:
    @wraps(function)
    def ranged(*args: Any) -> Any:
        with torch.profiler.record_function(name):
            return function(*args)

    return ranged
