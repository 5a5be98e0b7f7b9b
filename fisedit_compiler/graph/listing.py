"""A graph as text that a person reads: a line a node, with its layout and shape, under the module it comes from.

The code runs nowhere; ``torch.fx`` generates code that does (``graph.python_code("self").src``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fisedit_compiler.graph import ir
from fisedit_compiler.graph.inputs import input_of
from fisedit_compiler.graph.layout import Layout
from fisedit_compiler.graph.specs import ValueSpec

_COMMENT_COLUMN = 88


def listing(graph: fx.Graph, path: str = "") -> list[str]:
    """The lines of a graph, or of the nodes of one module and of what is in it.

    A comment line names the module in the user's model and the source line, where they change. Behind a node stand its
    layout (``map@2``: a map at half resolution; ``rows``: active sites only) and its shape in ``b, h, w, n_s``. A
    function that is a graph itself stands as a comment in front of its first call.

    Args:
        graph: a graph of the compiler, at any stage.
        path: dotted path in the user's model, such as ``down_blocks.0.resnets.0``.
    """
    lines: list[str] = []
    place: tuple[str, Any] = ("", None)
    shown: set[Any] = set()
    for node in graph.nodes:
        if path and not f"{ir.path_of(node)}.".startswith(f"{path}."):
            continue
        here = (ir.path_of(node), node.meta.get("source"))
        if node.op == "call_function" and here != place and any(here):
            lines.append("# " + " | ".join(str(part) for part in (here[0] or "the top module", here[1]) if part))
            place = here
        inside = getattr(node.target, "graph", None)
        if isinstance(inside, fx.Graph) and node.target not in shown:
            shown.add(node.target)
            lines += [f"# def {ir.target_name(node.target)}:", *(f"#     {line}" for line in listing(inside))]
        lines.append(line_of(node))
    return lines


def line_of(node: fx.Node) -> str:
    """One node: what it computes, and its layout and shape as a comment."""
    code, comment = code_of(node), describe_value(node)
    return f"{code:<{_COMMENT_COLUMN}}  # {comment}" if comment else code


def code_of(node: fx.Node) -> str:
    """One node as an assignment."""
    if node.op == "output":
        return f"return {format_value(node.args[0])}"
    if node.op == "placeholder":
        return f"{node.name} = input({format_input(node)})"
    if node.op == "get_attr":
        return f"{node.name} = self.{node.target}"
    arguments = [format_value(argument) for argument in node.args]
    arguments += [f"{name}={format_value(value)}" for name, value in node.kwargs.items()]
    return f"{node.name} = {ir.target_name(node.target)}({', '.join(arguments)})"


def describe_value(node: fx.Node) -> str:
    """Layout and shape of what a node gives; empty for sizes and outputs."""
    spec = node.meta.get("spec")
    if isinstance(spec, tuple):
        return ", ".join(_shape(part) for part in spec)
    if not isinstance(spec, ValueSpec):
        return ""
    layout = node.meta.get("layout")
    on_rows = any(str(symbol).startswith("n_") for size in spec.shape for symbol in size.free_symbols)
    kind = "rows" if on_rows else (str(layout) if isinstance(layout, Layout) and layout.kind != "plain" else "")
    return f"{kind} {_shape(spec)}".strip()


def format_input(node: fx.Node) -> str:
    """Where a placeholder's value comes from: ``call, sample``; the node's own name before lowering."""
    item = input_of(node)
    return repr(node.name) if item is None else str(item)


def format_value(value: Any) -> str:
    """An argument as it would be written."""
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (list, tuple)):
        inner = ", ".join(format_value(item) for item in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if isinstance(value, slice):
        return ":".join("" if part is None else format_value(part) for part in (value.start, value.stop, value.step))
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return repr(value)


def _shape(spec: ValueSpec) -> str:
    return f"[{', '.join(str(size) for size in spec.shape)}] {str(spec.dtype).removeprefix('torch.')}"
