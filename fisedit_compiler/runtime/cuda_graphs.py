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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fisedit_compiler.kernels.registry import registered_ops
from fisedit_compiler.runtime.site_plan import ConvKey, SitePlan

if TYPE_CHECKING:
    from fisedit_compiler.kernels.triton.stage_copies import CopyStager
    from fisedit_compiler.kernels.triton.stage_rings import RingStager

POOL_SIZE = 8
Identity = tuple[Any, ...]
Values = Mapping[str, Tensor]


def bucket(count: int) -> int:
    """The padded size of ``count`` rows: a multiple of 16, at most an eighth above it from 128 rows on."""
    step = 16
    while step * 16 <= count:
        step *= 2
    return -(-max(count, 1) // step) * step


# Ops whose meaning is pointwise or a copy: Inductor sees their references and fuses them with their neighbours.
_INLINED = ("gather_sites", "scatter_sites", "group_norm_sites", "update_statistics", "conv2d_sites")


def _inductor(graph: fx.GraphModule, example_inputs: Any) -> Any:
    """Inductor with the pointwise ``fisedit::`` ops taken apart."""
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    inlined = {registered_ops()[name].overload: registered_ops()[name].reference for name in _INLINED}
    return compile_fx(graph, example_inputs, decompositions={**select_decomp_table(), **inlined})


@dataclass(frozen=True)
class PreparedPlan:
    """A padded plan on the device, the tables a graph needs of it, and the number of its bucket."""

    bucket: int
    plan: SitePlan
    tables: dict[Identity, Tensor]


@dataclass(frozen=True)
class _Copies:
    """Graph inputs that every call fills: by one staging kernel where their memory is plain, one by one elsewhere."""

    staged: list[Identity]
    stager: CopyStager | None
    others: list[tuple[Identity, Tensor]]


@dataclass
class _Graph:
    """One captured graph, its inputs by identity, its flat outputs, and the plan whose tables are in its inputs."""

    graph: torch.cuda.CUDAGraph
    inputs: dict[Identity, Tensor]
    outputs: list[Tensor]
    copies: _Copies
    plan: PreparedPlan
    stagers: list[tuple[RingStager, list[str]]]


class GraphPool:
    """Compiled step of one program, and its CUDA graphs by (shape, bucket)."""

    def __init__(self, step: fx.GraphModule, identities: list[Identity], weights: frozenset[str] = frozenset()) -> None:
        """``identities`` are ``meta["input"]`` of the step's placeholders, in order.

        ``weights`` names the hoisted values that change with the weights only: graphs read them where they are.
        """
        self.identities = identities
        self._weights = [("hoisted", name) for name in sorted(weights) if ("hoisted", name) in identities]
        self.compiled: Callable[..., Any] = torch.compile(step, fullgraph=True, backend=_inductor)
        self._graphs: OrderedDict[tuple[Any, ...], _Graph] = OrderedDict()
        self._buckets: dict[tuple[Any, ...], int] = {}
        self._memory: Any = None

    def prepare(self, plan: SitePlan) -> PreparedPlan:
        """Pad a plan to its bucket."""
        rows: dict[Fraction, int] = {level: bucket(table.shape[0]) for level, table in plan.active.items()}
        rings: dict[ConvKey, int] = {key: bucket(table.shape[0]) for key, table in plan.ring.items()}
        padded = plan.padded(rows, rings)
        tables: dict[Identity, Tensor] = {}
        for identity in self.identities:
            kind, *rest = identity
            if kind == "table":
                tables[identity] = getattr(padded, rest[0])[rest[1]].contiguous()
            elif kind == "iota":
                ring = padded.ring[rest[0]]
                tables[identity] = torch.arange(ring.shape[0], device=ring.device)
        key = (*sorted(rows.items()), *sorted(rings.items(), key=str))
        number = self._buckets.setdefault(key, len(self._buckets))
        return PreparedPlan(number, padded, tables)

    def run(self, prepared: PreparedPlan, tensors: Values, slots: Values, hoisted: Values) -> list[Tensor]:
        """Replay (or first capture) the step; returned tensors are the caller's own."""
        key = (prepared.bucket, tuple(tuple(tensor.shape) for tensor in tensors.values()))
        if key not in self._graphs:
            self._graphs[key] = self._capture(prepared, tensors, slots, hoisted)
            while len(self._graphs) > POOL_SIZE:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        graph = self._graphs[key]
        self._fill(graph, prepared, {"call": tensors, "slot": slots, "hoisted": hoisted})
        graph.graph.replay()
        return [output.clone() for output in graph.outputs]

    def _fill(self, graph: _Graph, prepared: PreparedPlan, values: Mapping[str, Values]) -> None:
        """Bring everything the replay reads to the graph's own inputs."""
        for identity in self._weights:
            if values["hoisted"][identity[1]] is not graph.inputs[identity]:
                graph.inputs[identity].copy_(values["hoisted"][identity[1]])
        copies = graph.copies
        if copies.stager is not None:
            copies.stager.run([values[kind][name] for kind, name in copies.staged])
        for (kind, name), target in copies.others:
            target.copy_(values[kind][name])
        if graph.plan is not prepared:
            for identity, table in prepared.tables.items():
                graph.inputs[identity].copy_(table)
            graph.plan = prepared
            graph.stagers = self._stagers(prepared, graph.inputs, values["slot"])
        for stager, names in graph.stagers:
            stager.run([values["slot"][name] for name in names])

    def _copies(self, inputs: Mapping[Identity, Tensor], values: Mapping[str, Values]) -> _Copies:
        from fisedit_compiler.kernels.triton.stage_copies import CopyStager, can_stage

        kinds = ("call", "slot", "hoisted")
        filled = [i for i in self.identities if i[0] in kinds and i not in self._weights]
        # The sample is whatever the caller passes; everything else keeps its strides from call to call.
        staged = [i for i in filled if i[0] != "call" and can_stage(inputs[i]) and can_stage(values[i[0]][i[1]])]
        stager = CopyStager([inputs[identity] for identity in staged]) if staged else None
        return _Copies(staged, stager, [(identity, inputs[identity]) for identity in filled if identity not in staged])

    def _stagers(
        self, prepared: PreparedPlan, inputs: Mapping[Identity, Tensor], slots: Values
    ) -> list[tuple[RingStager, list[str]]]:
        """One stager per dtype for all ring rows."""
        from fisedit_compiler.kernels.triton.stage_rings import RingStager

        by_dtype: dict[torch.dtype, list[Identity]] = {}
        for identity in self.identities:
            if identity[0] == "ring_rows":
                by_dtype.setdefault(inputs[identity].dtype, []).append(identity)
        result = []
        for jobs in by_dtype.values():
            names = [identity[1] for identity in jobs]
            rings = [prepared.plan.ring[identity[2]].contiguous() for identity in jobs]
            sites = [slots[name].shape[1] for name in names]
            result.append((RingStager([inputs[identity] for identity in jobs], rings, sites), names))
        return result

    def _capture(self, prepared: PreparedPlan, tensors: Values, slots: Values, hoisted: Values) -> _Graph:
        values: dict[str, Values] = {"call": tensors, "slot": slots, "hoisted": hoisted}
        inputs: dict[Identity, Tensor] = {}
        for identity in self.identities:
            kind, *rest = identity
            if kind == "ring_rows":
                value = slots[rest[0]].index_select(1, prepared.plan.ring[rest[1]])
            elif kind in ("table", "iota"):
                value = prepared.tables[identity]
            else:
                value = values[kind][rest[0]]
            if identity in self._weights:
                inputs[identity] = value
                continue
            inputs[identity] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
            inputs[identity].copy_(value)
            if kind in ("iota", "ring_rows") or (kind == "table" and rest[0] != "inverse"):
                torch._dynamo.mark_dynamic(inputs[identity], 1 if kind == "ring_rows" else 0)
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
        stagers = self._stagers(prepared, inputs, slots)
        return _Graph(graph, inputs, list(outputs), self._copies(inputs, values), prepared, stagers)
