"""The compiler's view of a graph: what a value is, and the marker operations passes speak in.

A graph under rewriting is an ordinary ``torch.fx.Graph`` of functional ATen. Each tensor node carries
``meta["spec"]`` (a :class:`ValueSpec`: sympy shape and dtype) and, once inferred, ``meta["layout"]``. We keep our own
specs instead of re-executing under fake tensors after every pass: re-execution with symbolic shapes costs 10-20 ms
a node (SD2.1: half a minute a pass), while every rewrite knows the shape of what it writes.

Four *markers* stand for what is decided during rewriting and lowered once at the end (``passes/programs/lower.py``):

``pack(value)``            dense value -> rows of the active sites
``unpack(rows, base)``     rows -> dense value, inactive sites from ``base``
``load(slot)``             a recorded value
``site_table(kind, key)``  an index table of the site plan

No rewriting and no layout rule lives here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from fisedit_compiler.graph.specs import ValueSpec


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


def unused_name(graph: fx.Graph, name: str) -> str:
    """``name``, or it with a number behind it: placeholders of equal names would be one argument twice."""
    taken = {str(node.target) for node in graph.nodes if node.op == "placeholder"}
    candidates = (name, *(f"{name}_{number}" for number in range(1, len(taken) + 1)))
    return next(candidate for candidate in candidates if candidate not in taken)


def nodes_calling(graph: fx.Graph, targets: Iterable[Any]) -> list[fx.Node]:
    """All call nodes of the given targets, in graph order."""
    wanted = set(targets)
    return [node for node in graph.nodes if node.op == "call_function" and node.target in wanted]


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy with equal node names and copied metadata."""
    copy = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    result = copy.graph_copy(graph, mapping)
    output = copy.output(result)
    output.meta = dict(next(node for node in graph.nodes if node.op == "output").meta)
    return copy
