"""The recording graph in the form that is compiled: what it returns is what its own operations read and compute.

Interpreted, a slot is memory of its own, which costs a copy of every canvas and another reading of every norm's input.
Compiled, results are copied out of the graph's memory anyway. So here

Before: ``group_norm(x), group_norm_statistics(x)``, ``flatten(clone(permute(x)))`` and ``conv2d(x, weight)``
After:  ``normalise(x, s := group_norm_statistics(x)), s``, ``permute(x)``, which a convolution reads in that order, and
        ``conv2d(x, packed)``: convolutions compute in ``channels_last``, and the sparse step has the weight in that
        order already; of any other it would be brought there at every call

and :meth:`DenseForm.finish` brings the results into the form of the interpreted ones.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fisedit_compiler.graph.specs import has_spec, spec_of
from fisedit_compiler.passes.programs.hoist import Bundle

aten = torch.ops.aten
fisedit = torch.ops.fisedit


@dataclass(frozen=True)
class DenseForm:
    """A graph to compile, and how its results become those of the graph that it was made of.

    Attributes:
        graph: the graph.
        flattened: by the position of a result, the axes (first and last) that are still to be flattened.
        packed: paths of weights that the graph gets packed, behind its other arguments.
    """

    graph: fx.GraphModule
    flattened: dict[int, tuple[int, int]]
    packed: tuple[str, ...] = ()

    def finish(self, results: Sequence[Any]) -> list[Any]:
        """The first results, copied out, in the form of the interpreted ones: contiguous where those are."""
        finished = list(results)
        for position, (first, last) in self.flattened.items():
            if position < len(finished):
                finished[position] = finished[position].contiguous().flatten(first, last)
        return finished


def packed_weights(bundles: Iterable[Bundle]) -> dict[str, str]:
    """The names of hoisted values that are packed weights of convolutions, by the path of the weight."""
    found = {}
    for bundle in bundles:
        given: Any = bundle.graph.output_node().args[0]
        for name, value in zip(bundle.values, given, strict=True):
            if value.target is fisedit.pack_conv_weight.default and value.args[0].op == "get_attr":
                found[str(value.args[0].target)] = name
    return found


def dense_form(recording: fx.GraphModule, packed: Collection[str] = ()) -> DenseForm:
    """The form of a recording graph that is compiled; the graph itself stays as it is.

    ``packed`` are paths of weights that there are in the order of ``pack_conv_weight``, too.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(recording.graph, {}))
    _share_statistics(graph)
    flattened = _return_views(graph)
    paths = _read_packed(graph, packed)
    graph.eliminate_dead_code()
    graph.lint()
    return DenseForm(fx.GraphModule(recording, graph), flattened, paths)


def normalise(
    x: Tensor, statistics: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """GroupNorm of ``x`` ``[B, C, *spatial]`` with its mean and variance ``[B, groups, 2]`` given (float32).

    In float32 and rounded once, as Inductor computes ``group_norm``.
    """
    grouped = x.float().reshape(x.shape[0], groups, x.shape[1] // groups, -1)
    mean, variance = statistics[..., :1, None], statistics[..., 1:, None]
    values = ((grouped - mean) * torch.rsqrt(variance + eps)).reshape(x.shape)
    per_channel = (1, -1, *(1 for _ in x.shape[2:]))
    if weight is not None:
        values = values * weight.reshape(per_channel)
    if bias is not None:
        values = values + bias.reshape(per_channel)
    return values.to(x.dtype)


def _share_statistics(graph: fx.Graph) -> None:
    order = {node: place for place, node in enumerate(graph.nodes)}
    recorded = {
        node.args: node for node in graph.nodes if node.target is fisedit.group_norm_statistics.default
    }  # by input and groups
    shared: dict[tuple[Any, int], fx.Node] = {}
    for norm in [node for node in graph.nodes if node.target is aten.group_norm.default]:
        x, groups, weight, bias, eps = _arguments_of(norm)
        statistics = recorded.get((x, groups))
        # Statistics are recorded in float32, which is less than a norm of float64 computes in.
        if statistics is None or not has_spec(x) or spec_of(x).dtype is torch.float64:
            continue
        own = shared.get((x, groups))
        if own is None:  # not so for the second norm of one input
            with graph.inserting_before(min(norm, statistics, key=order.__getitem__)):
                own = graph.call_function(fisedit.group_norm_statistics.default, (x, groups))
            own.meta = dict(statistics.meta)
            statistics.replace_all_uses_with(own)
            shared[x, groups] = own
        with graph.inserting_before(norm):
            normalised = graph.call_function(normalise, (x, own, groups, weight, bias, eps))
            normalised.meta = dict(norm.meta)
        norm.replace_all_uses_with(normalised)


def _arguments_of(norm: fx.Node) -> tuple[Any, int, Any, Any, float]:
    names = ("input", "num_groups", "weight", "bias", "eps")
    given: dict[str, Any] = {**dict(zip(names, norm.args, strict=False)), **norm.kwargs}
    return given["input"], given["num_groups"], given.get("weight"), given.get("bias"), given.get("eps", 1e-5)


def _return_views(graph: fx.Graph) -> dict[int, tuple[int, int]]:
    """Return canvases as the permuted values that they are copies of; the axes of each that are to be flattened."""
    output = graph.output_node()
    given: Any = output.args[0]
    results, flattened = list(given), {}
    for position, result in enumerate(given):
        clone: Any = result.args[0] if _is(result, aten.flatten.using_ints) else None
        permuted: Any = clone.args[0] if _is_contiguous_clone(clone) else None
        if _is(permuted, aten.permute.default):
            axes = list(result.args[1:])
            results[position] = permuted
            flattened[position] = (axes[0] if axes else 0, axes[1] if len(axes) > 1 else -1)
    output.args = (tuple(results),)
    return flattened


def _read_packed(graph: fx.Graph, packed: Collection[str]) -> tuple[str, ...]:
    """Let convolutions read packed weights as new inputs, in the order of the paths that are returned."""
    convolutions: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=aten.conv2d.default):
        weight: Any = node.args[1]
        if weight.op == "get_attr" and str(weight.target) in packed:
            convolutions.setdefault(weight, []).append(node)
    last = graph.find_nodes(op="placeholder")[-1]
    for number, (weight, nodes) in enumerate(convolutions.items()):
        out_channels, channels, height, width = map(int, spec_of(weight).shape)
        with graph.inserting_after(last):
            last = graph.placeholder(f"packed_{number}")
        with graph.inserting_after(weight):
            apart = graph.call_function(aten.view.default, (last, [out_channels, height, width, channels]))
        with graph.inserting_after(apart):
            there = graph.call_function(aten.permute.default, (apart, [0, 3, 1, 2]))
        for node in nodes:
            node.replace_input_with(weight, there)
    return tuple(str(weight.target) for weight in convolutions)


def _is_contiguous_clone(value: Any) -> bool:
    return _is(value, aten.clone.default) and value.kwargs.get("memory_format") is torch.contiguous_format


def _is(value: Any, target: Any) -> bool:
    return isinstance(value, fx.Node) and value.target is target
