"""A graph as text that can be compared: a line a node, ``%`` before every node's name and ``$`` before every slot's.

The package prints graphs for people, and is free to print them otherwise tomorrow. This form is for
``compare.py``, which goes by the two signs to tell another name from another operation.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx

from replay import access
from replay.access import NamedGraph, value_text


def graph_lines(named: NamedGraph, constants: Mapping[str, Tensor]) -> list[str]:
    """The lines of a graph, behind those of the graphs whose hoisted values it takes, directly or by way of another.

    What a graph returns is a line each, so that another order of recorded slots is another order of lines.
    """
    if not any(node.op == "placeholder" and access.input_of(node)[0] == "hoisted" for node in named.graph.nodes):
        return _lines(named.graph, "", {}, constants)[0]
    known: dict[str, str] = {}
    blocks: list[tuple[list[str], set[str], set[str]]] = []
    for number, (graph, values) in enumerate(named.hoisted):
        prefix = f"hoisted{number}."
        lines, taken = _lines(graph, prefix, known, constants)
        returned = [f"%{prefix}{node.name}" for node in _returned(graph)]
        known.update(zip(values, returned, strict=True))
        blocks.append((lines, set(values), taken))
    lines, needed = _lines(named.graph, "", known, constants)
    for block, values, taken in reversed(blocks):
        if values & needed:
            lines = [*block, *lines]
            needed |= taken
    return lines


def _lines(
    graph: fx.Graph, prefix: str, known: Mapping[str, str], constants: Mapping[str, Tensor]
) -> tuple[list[str], set[str]]:
    """The lines, and the names of the hoisted values that the graph takes."""
    lines: list[str] = []
    taken: set[str] = set()
    for node in graph.nodes:
        if node.op == "output":
            kind = "hoists" if prefix else "returns"
            lines += [f"{kind} {_argument(value, prefix)}" for value in _flat(node.args[0])]
            continue
        if node.op == "placeholder":
            code, hoisted = _input(node, known)
            taken |= hoisted
        elif node.op == "get_attr":
            name = str(node.target)
            code = f"constant({value_text(constants[name])})" if name in constants else f"attribute({name})"
        else:
            code = _call(node, prefix)
        described = access.description_of(node)
        lines.append(f"%{prefix}{node.name} = {code}" + (f" : {described}" if described else ""))
    return lines, taken


def _input(node: fx.Node, known: Mapping[str, str]) -> tuple[str, set[str]]:
    kind, *values = access.input_of(node)
    if kind == "hoisted":
        return f"hoisted({known.get(values[0], '%' + values[0])})", {values[0]}
    written = [value if isinstance(value, str) else value_text(value) for value in values]
    if kind in access.SLOT_INPUTS:
        written[0] = f"${written[0]}"
    return f"input({', '.join([kind, *written])})", set()


def _call(node: fx.Node, prefix: str) -> str:
    target = access.target_text(node.target)
    arguments = [_argument(argument, prefix) for argument in node.args]
    if target == "load":
        arguments = [f"${node.args[0]}"]
    arguments += [f"{name}={_argument(value, prefix)}" for name, value in sorted(node.kwargs.items())]
    return f"{target}({', '.join(arguments)})"


def _argument(value: object, prefix: str) -> str:
    if isinstance(value, fx.Node):
        return f"%{prefix}{value.name}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_argument(item, prefix) for item in value)}]"
    if isinstance(value, slice):
        return f"slice({', '.join(_argument(part, prefix) for part in (value.start, value.stop, value.step))})"
    return value_text(value)


def _flat(returned: object) -> list[object]:
    return list(returned) if isinstance(returned, (list, tuple)) else [returned]


def _returned(graph: fx.Graph) -> list[fx.Node]:
    output = next(node for node in graph.nodes if node.op == "output")
    return [value for value in _flat(output.args[0]) if isinstance(value, fx.Node)]
