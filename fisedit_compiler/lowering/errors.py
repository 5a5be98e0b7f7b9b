"""Which node of a step torch could not turn into code, and what to tell the user.

Torch's own errors speak of its graphs, kernels and buffers. Three ways lead from there to a node of the step, which
knows its module and line in the user's model. The first that finds one is taken:

1. The error says so: Dynamo and Inductor name the line of the step's code that they were at.
2. The step is run node by node without being compiled: one that fails there is no matter of compilation.
3. Ever shorter beginnings of the step are compiled, until the one that fails ends in the node at fault.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from fisedit_compiler.errors import LoweringError
from fisedit_compiler.graph import ir
from fisedit_compiler.graph.specs import ValueSpec
from fisedit_compiler.lowering.regions import whole

Compile = Callable[[fx.GraphModule], Callable[..., Any]]

_LINE_OF_STEP = re.compile(r'File "<eval_with_key>[^\n]*\n\s*(\w+) = ')
_LINES_SHOWN = 6


def lowering_error(
    error: Exception,
    step: fx.GraphModule,
    arguments: Sequence[Any],
    compile_with: Compile | None,
    strict: bool = True,
) -> Exception:
    """What to raise for an error of compiling, capturing or first running a step.

    Args:
        error: torch's.
        step: what was to be compiled, as it was handed to the compiler.
        arguments: its arguments.
        compile_with: compiles a graph module as the step was; ``None`` if nothing was compiled.
        strict: whether the error ends the call. If it is to be made again eagerly, nothing is compiled to find the
            node, which takes minutes, and memory that ran out is a reason like every other.

    Returns:
        A :class:`LoweringError` naming node, module and source line, with the remedy; if ``strict``, the error itself
        if memory ran out, which is no fault of the step.
    """
    out_of_memory = isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError))
    if out_of_memory and strict:
        return error
    step = whole(step)
    node = _named(error, step.graph)
    # After an error of the device itself every further call fails, so that running anything would blame its first node.
    if node is None and not out_of_memory and not isinstance(error, torch.AcceleratorError):
        node = _raising(step, arguments)
        if node is None and compile_with is not None and strict:
            node = first_failing(step, lambda prefix: _fails(compile_with, prefix, arguments))
    place = "the whole step" if node is None else described(node)
    raised = LoweringError(
        f"The sparse step could not be made into code for this device, at {place}: {_first_lines(error)}\n"
        'Remedy: SparsifyConfig(backend="eager") runs the same program without compiling it. If the operation is of '
        "another package, give it a fake implementation (torch.library.register_fake) that is right for symbolic sizes."
    )
    raised.node = "" if node is None else str(node.meta.get("origin", node.name))
    return raised


def described(node: fx.Node) -> str:
    """Where a node of a step comes from; one that lowering added is described by what it was added for."""
    known = [other for other in (node, *node.users, *node.all_input_nodes) if other.meta.get("source")]
    text = ir.describe(node)
    return text if not known or known[0] is node else f"{text}, added for {ir.describe(known[0])}"


def first_failing(step: fx.GraphModule, fails: Callable[[fx.GraphModule], bool]) -> fx.Node | None:
    """The last node of the shortest beginning of a step that fails, by halving; ``None`` if the whole does not.

    A beginning returns every value of its own that later nodes read, so that none of its nodes is dropped.
    """
    calls = [node for node in step.graph.nodes if node.op == "call_function"]
    if not calls or not fails(prefix_of(step, calls[-1])):
        return None
    passing, failing = -1, len(calls) - 1
    while failing - passing > 1:
        middle = (passing + failing) // 2
        if fails(prefix_of(step, calls[middle])):
            failing = middle
        else:
            passing = middle
    return calls[failing]


def prefix_of(step: fx.GraphModule, last: fx.Node) -> fx.GraphModule:
    """The step up to and with a node, with the same inputs; what it returns is :func:`frontier`."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in step.graph.nodes:
        if node.op == "output" or (node > last and node.op == "call_function"):
            continue
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in frontier(step.graph, last)))
    return fx.GraphModule(step, graph)


def frontier(graph: fx.Graph, last: fx.Node) -> list[fx.Node]:
    """Tensors computed up to a node that are read after it, and those that nothing reads."""
    return [
        node
        for node in graph.nodes
        if node.op == "call_function"
        and not node > last
        and isinstance(node.meta.get("spec"), ValueSpec)
        and (not node.users or any(user > last or user.op == "output" for user in node.users))
    ]


def _named(error: BaseException, graph: fx.Graph) -> fx.Node | None:
    """The node whose line torch was at, by the text of the errors or by the graph nodes in their frames."""
    names = {node.name: node for node in graph.nodes if node.op == "call_function"}
    for text in _texts(error):
        found = [names[name] for name in _LINE_OF_STEP.findall(text) if name in names]
        if found:
            return found[-1]
    return None


def _texts(error: BaseException) -> Iterator[str]:
    """Innermost error first: what the graph node that it was raised for says of its origin, then its own message."""
    chain, current = [], error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__  # type: ignore[assignment]
    for raised in reversed(chain):
        for frame, _ in reversed(list(traceback.walk_tb(raised.__traceback__))):
            # torch.fx.Interpreter.run_node(self, n), which Inductor's lowering overrides.
            node = frame.f_locals.get("n")
            if isinstance(node, fx.Node) and node.stack_trace:
                yield node.stack_trace
        yield str(raised)


class _Tracking(fx.Interpreter):
    """Remembers the node that is run."""

    current: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.current = n
        return super().run_node(n)


def _raising(step: fx.GraphModule, arguments: Sequence[Any]) -> fx.Node | None:
    """The node that raises when the step is run without being compiled."""
    interpreter = _Tracking(step)
    interpreter.extra_traceback = False
    try:
        with torch.no_grad():
            interpreter.run(*arguments)
    except Exception:
        return interpreter.current
    return None


def _fails(compile_with: Compile, prefix: fx.GraphModule, arguments: Sequence[Any]) -> bool:
    try:
        with torch.no_grad():
            compile_with(prefix)(*arguments)
    except Exception:
        return True
    return False


def _first_lines(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip() and "TORCH_LOGS=" not in line]
    return f"{type(error).__name__}: " + "\n".join(lines[:_LINES_SHOWN])
