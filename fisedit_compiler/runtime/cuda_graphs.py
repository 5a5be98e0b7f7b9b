"""Sparse calls on a GPU: one torch.compile per model, one CUDA graph per bucket of row counts.

A graph replays fixed work on fixed addresses. So row counts are rounded up to buckets (the plan is padded by repeated
rows), and what a call brings along is copied into the graph's own inputs first: the sample, the hoisted values, and
of the recording what the step reads — of a convolution's canvas only the ring. The pool of graphs is bounded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx

from fisedit_compiler.kernels.registry import registered_ops
from fisedit_compiler.runtime.site_plan import ConvKey, SitePlan

POOL_SIZE = 8


def bucket(count: int) -> int:
    """The padded size of ``count`` rows: a multiple of 16, at most an eighth above it from 128 rows on."""
    step = 16
    while step * 16 <= count:
        step *= 2
    return -(-max(count, 1) // step) * step


# Ops whose meaning is pointwise or a copy: Inductor sees their references and fuses them with their neighbours.
_INLINED = ("gather_sites", "scatter_sites", "group_norm_sites", "update_statistics")


def _inductor(graph: fx.GraphModule, example_inputs: Any) -> Any:
    """Inductor with the pointwise ``fisedit::`` ops taken apart."""
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    inlined = {registered_ops()[name].overload: registered_ops()[name].reference for name in _INLINED}
    return compile_fx(graph, example_inputs, decompositions={**select_decomp_table(), **inlined})


@dataclass
class _Graph:
    """One captured graph, its inputs by identity and its flat outputs."""

    graph: torch.cuda.CUDAGraph
    inputs: dict[tuple[Any, ...], Tensor]
    outputs: list[Tensor]


@dataclass
class PreparedPlan:
    """A padded plan on the device, and the tables a graph needs of it."""

    key: tuple[Any, ...]
    plan: SitePlan
    tables: dict[tuple[Any, ...], Tensor]


class GraphPool:
    """Compiled step of one program, and its CUDA graphs by (shape, bucket)."""

    def __init__(self, step: fx.GraphModule, identities: list[tuple[Any, ...]]) -> None:
        """``identities`` are ``meta["input"]`` of the step's placeholders, in order."""
        self.identities = identities
        self.compiled: Callable[..., Any] = torch.compile(step, fullgraph=True, backend=_inductor)
        self._graphs: OrderedDict[tuple[Any, ...], _Graph] = OrderedDict()
        self._memory: Any = None

    def prepare(self, plan: SitePlan) -> PreparedPlan:
        """Pad a plan to its bucket."""
        rows: dict[Fraction, int] = {level: bucket(table.shape[0]) for level, table in plan.active.items()}
        rings: dict[ConvKey, int] = {key: bucket(table.shape[0]) for key, table in plan.ring.items()}
        padded = plan.padded(rows, rings)
        tables: dict[tuple[Any, ...], Tensor] = {}
        for identity in self.identities:
            kind, *rest = identity
            if kind == "table":
                tables[identity] = getattr(padded, rest[0])[rest[1]].contiguous()
            elif kind == "iota":
                ring = padded.ring[rest[0]]
                tables[identity] = torch.arange(ring.shape[0], device=ring.device)
        key = (*sorted(rows.items()), *sorted(rings.items(), key=str))
        return PreparedPlan(key, padded, tables)

    def run(
        self,
        prepared: PreparedPlan,
        tensors: Mapping[str, Tensor],
        slots: Mapping[str, Tensor],
        hoisted: Mapping[str, Tensor],
    ) -> list[Tensor]:
        """Replay (or first capture) the step; returned tensors are the caller's own."""
        values = self._values(prepared, tensors, slots, hoisted)
        shape = next(iter(tensors.values())).shape if tensors else ()
        key = (prepared.key, tuple((name, tuple(tensor.shape)) for name, tensor in sorted(tensors.items())), shape)
        if key not in self._graphs:
            self._graphs[key] = self._capture(values)
            while len(self._graphs) > POOL_SIZE:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        graph = self._graphs[key]
        torch._foreach_copy_([graph.inputs[identity] for identity in values], list(values.values()))
        graph.graph.replay()
        return [output.clone() for output in graph.outputs]

    def _values(
        self,
        prepared: PreparedPlan,
        tensors: Mapping[str, Tensor],
        slots: Mapping[str, Tensor],
        hoisted: Mapping[str, Tensor],
    ) -> dict[tuple[Any, ...], Tensor]:
        values: dict[tuple[Any, ...], Tensor] = {}
        for identity in self.identities:
            kind, *rest = identity
            if kind == "call":
                values[identity] = tensors[rest[0]]
            elif kind == "slot":
                values[identity] = slots[rest[0]]
            elif kind == "ring_rows":
                values[identity] = slots[rest[0]].index_select(1, prepared.plan.ring[rest[1]])
            elif kind == "hoisted":
                values[identity] = hoisted[rest[0]]
            else:
                values[identity] = prepared.tables[identity]
        return values

    def _capture(self, values: Mapping[tuple[Any, ...], Tensor]) -> _Graph:
        inputs = {
            identity: torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device)
            for identity, v in values.items()
        }
        for identity, value in values.items():
            inputs[identity].copy_(value)
            if identity[0] in ("table", "iota", "ring_rows"):
                torch._dynamo.mark_dynamic(inputs[identity], 1 if identity[0] == "ring_rows" else 0)
        arguments = [inputs[identity] for identity in self.identities]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.compiled(*arguments)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if self._memory is None:
            self._memory = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._memory):
            outputs = self.compiled(*arguments)
        return _Graph(graph, inputs, list(outputs))
