"""A region of a graph as one call: a function of its own, which Inductor compiles once for all of its calls.

``torch.compiler.nested_compile_region`` does the same for Python functions, but traces each call anew. Here a region is
a graph already. Whoever traces a call of it is given torch's own higher-order operation for repeated regions,
``invoke_subgraph``, by which Inductor makes one function of it. What is not being compiled just runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, is_fake
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, track_tensor_tree

_ALIGNMENT = 16
"""Bytes by which Inductor's kernels expect what they read to be aligned."""


@dataclass(frozen=True)
class _Result:
    """What a tracer must know of a result."""

    size: Sequence[Any]
    stride: Sequence[Any]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, value: Tensor) -> _Result:
        return cls(tuple(value.shape), value.stride(), value.dtype, value.device)

    def empty(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)


_KNOWN: WeakKeyDictionary[TracingContext, dict[str, list[_Result]]] = WeakKeyDictionary()
"""Results of regions for calls of one form, while one graph is compiled: tracers ask several times for every call."""


_TRACED: WeakKeyDictionary[Any, dict[str, str]] = WeakKeyDictionary()
"""By tracer and form of a call: the graph that was traced for the first such call, an attribute of what is traced."""


class Region:
    """A graph of its own, with the calls that it stands for.

    Attributes:
        name: unique among the regions of a graph.
        graph: from tensors to a tuple of tensors; no result is a view of an argument or of another result.
    """

    def __init__(self, name: str, graph: fx.Graph) -> None:
        self.name, self.graph = name, graph
        self._module = fx.GraphModule(nn.Module(), graph, class_name=name)

    def __call__(self, *operands: Tensor) -> tuple[Tensor, ...]:
        context = TracingContext.try_get()
        if context is None or not all(map(is_fake, operands)):
            return tuple(self._module(*operands))
        from torch._higher_order_ops.invoke_subgraph import invoke_subgraph

        # One compilation serves calls of one form. Regions are chosen so that calls agree in it; should sizes or
        # layouts turn out to differ, which a graph does not tell, the call has a compilation of its own.
        name = f"{self.name}_{_form(operands)}"
        known = _KNOWN.setdefault(context, {})
        mode = get_proxy_mode()
        if mode is not None:
            again = name in known and all(isinstance(operand, FakeTensor) for operand in operands)
            if again and name in _TRACED.get(mode.tracer, {}):
                return _called_again(mode.tracer, name, operands, known[name])
            results = tuple(invoke_subgraph(self._module, name, *operands))
            known.setdefault(name, [_Result.of(result) for result in results])
            _note_traced(mode.tracer, name, results)
            return results
        if name not in known:
            known[name] = [_Result.of(result) for result in self._module(*operands)]
        return tuple(result.empty() for result in known[name])

    def as_target(self) -> Callable[..., tuple[Tensor, ...]]:
        """A function to be called in a graph, with the region's name."""

        def call(*operands: Tensor) -> tuple[Tensor, ...]:
            return self(*operands)

        call.__name__ = call.__qualname__ = self.name
        call.region, call.graph = self, self.graph  # type: ignore[attr-defined]
        return call


def _note_traced(tracer: Any, name: str, results: Sequence[Tensor]) -> None:
    """Keep which graph stands for a call of a region, if its results are values of this tracer's own."""
    result = tracer.unwrap_proxy(results[0])
    if isinstance(result, fx.Proxy):
        call = result.node.args[0]
        assert isinstance(call, fx.Node) and isinstance(call.args[0], fx.Node)
        _TRACED.setdefault(tracer, {})[name] = str(call.args[0].target)


def _called_again(tracer: Any, name: str, operands: Sequence[Tensor], results: Sequence[_Result]) -> tuple[Tensor, ...]:
    """The results of another call of a traced region: ``invoke_subgraph`` would run it to know their shapes."""
    from torch._higher_order_ops.invoke_subgraph import invoke_subgraph

    graph = tracer.create_proxy("get_attr", _TRACED[tracer][name], (), {})
    arguments = (graph, name, *map(tracer.unwrap_proxy, operands))
    call = tracer.create_proxy("call_function", invoke_subgraph, arguments, {})
    with disable_proxy_modes_tracing():
        values = tuple(result.empty() for result in results)
    return tuple(track_tensor_tree(values, call, constant=None, tracer=tracer))


def region_of(node: fx.Node) -> Region | None:
    """The region that a node calls."""
    return getattr(node.target, "region", None) if node.op == "call_function" else None


def allow_regions(graph: fx.Graph) -> None:
    """Let Dynamo take the regions that a graph calls as they are."""
    for target in {node.target for node in graph.nodes if region_of(node)}:
        torch._dynamo.allow_in_graph(target)  # type: ignore[no-untyped-call]


def whole(step: fx.GraphModule) -> fx.GraphModule:
    """A step without regions; the step itself if it has none."""
    return fx.GraphModule(step, inlined(step.graph)) if any(map(region_of, step.graph.nodes)) else step


def inlined(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph with every region's calls in place of a call of the region."""
    copy = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    results: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for node in graph.nodes:
        region = region_of(node)
        if region is not None:
            placeholders = region.graph.find_nodes(op="placeholder")
            inside = {inner: mapping[operand] for inner, operand in zip(placeholders, node.args, strict=True)}
            results[node] = copy.graph_copy(region.graph, inside)  # type: ignore[assignment]
        elif node.args and node.args[0] in results:
            mapping[node] = results[node.args[0]][node.args[1]]
        else:
            mapping[node] = copy.node_copy(node, mapping.__getitem__)
    copy.lint()
    return copy


def _form(operands: Iterable[Any]) -> str:
    """What code for these operands may rely on: their sizes, layouts and alignment, in words."""
    described = " ".join(_described(operand) for operand in operands)
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return str(value)
    # Tables are read by whole kernels, which look at the address themselves.
    offset = value.storage_offset() * value.element_size() if value.is_floating_point() else 0
    aligned = offset % _ALIGNMENT == 0 if isinstance(offset, int) else str(offset)
    sizes = [*map(str, value.shape)], [*map(str, value.stride())]
    return f"{value.dtype} {value.device} {sizes} {aligned}"
