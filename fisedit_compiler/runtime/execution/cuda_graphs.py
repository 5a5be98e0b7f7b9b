"""Sparse calls on a GPU: one compilation per model, one CUDA graph per bucket of row counts.

A graph replays fixed work on fixed addresses. So row counts are rounded up to buckets (the plan is padded by repeated
rows), and what a call reads of its recording is staged by the graph itself: it begins by copying ring rows and small
tensors to its own buffers, from wherever a table of addresses says, and finds keys and values through the same table.
A call fills in the sample and the table. The pool of graphs is bounded.

Runs share a pool: filling the buffers, replaying and copying the results out is one step, made ``in_order``. A graph is
captured outside of it, on buffers that nobody else knows yet.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fisedit_compiler.compiling import one_at_a_time
from fisedit_compiler.geometry.conv_tables import ConvKey
from fisedit_compiler.geometry.site_plan import SitePlan
from fisedit_compiler.graph.inputs import (
    AddressedInput,
    AddressInput,
    CallInput,
    HeldInput,
    HoistedInput,
    Input,
    IotaInput,
    RingRowsInput,
    SlotInput,
    TableInput,
    graph_inputs,
)
from fisedit_compiler.kernels.addresses import is_plain
from fisedit_compiler.lowering.codegen.inductor import compile_step
from fisedit_compiler.lowering.errors import lowering_error
from fisedit_compiler.recordings.stores import SlotStore
from fisedit_compiler.recordings.stores.addresses import SlotAddresses, SlotLayout
from fisedit_compiler.runtime.execution.graph_capture import capture_into
from fisedit_compiler.runtime.execution.hoisting import Hoisted, HoistedGroup
from fisedit_compiler.runtime.execution.in_order import InOrder
from fisedit_compiler.runtime.execution.owned_outputs import OwnedOutputs
from fisedit_compiler.runtime.execution.padded_plans import PaddedPlan, PaddedPlans
from fisedit_compiler.tensors.late import LateTensors

if TYPE_CHECKING:
    from fisedit_compiler.kernels.triton.stage_copies import CopyStager
    from fisedit_compiler.kernels.triton.stage_rings import RingStager

POOL_SIZE = 8
Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class HoistedNames:
    """What a pool must know of one bundle: the names of its values, and whether they change at every call."""

    values: tuple[str, ...]
    per_call: bool
    weights_only: bool


@dataclass(frozen=True)
class _GroupInputs:
    """What of one bundle a graph reads: its entries in the table, or buffers of the graph that are copied to."""

    entries: Tensor | None
    buffers: tuple[tuple[str, Tensor], ...]


@dataclass
class _Graph:
    """One captured graph and what has to be filled before a replay; the last three say what it was filled with."""

    graph: torch.cuda.CUDAGraph
    outputs: list[Tensor]
    calls: list[tuple[str, Tensor]]
    table: Tensor
    slots: Tensor
    layout: SlotLayout
    unstaged: list[tuple[str, Tensor]]
    groups: list[_GroupInputs]
    tables: dict[Input, Tensor]
    rings: dict[ConvKey, Tensor]
    stagers: list[CopyStager | RingStager]
    plan: PaddedPlan
    owned: OwnedOutputs
    filled_groups: list[Callable[[], HoistedGroup | None]] = field(default_factory=list)
    filled_slots: Tensor | None = None


class GraphPool:
    """Compiled step of one program, and its CUDA graphs by (shape, bucket)."""

    def __init__(
        self,
        step: fx.GraphModule,
        slot_names: Sequence[str],
        bundles: Sequence[HoistedNames],
        rows: Mapping[int, tuple[int, Fraction]] = MappingProxyType({}),
        in_order: InOrder | None = None,
        together: Mapping[int, Hashable] = MappingProxyType({}),
    ) -> None:
        """``step`` is lowered, see ``lowering/lowered.py``.

        ``slot_names`` gives the order of the table of addresses, ``bundles`` describes the groups of hoisted values in
        theirs. ``rows`` and ``together`` are those of :class:`OwnedOutputs`. ``in_order`` is held by whoever uses what
        graphs read.
        """
        self.rows, self.together = rows, together
        self.in_order = in_order or InOrder()
        self.inputs, self.slot_names, self.bundles = graph_inputs(step.graph), tuple(slot_names), tuple(bundles)
        self.step = step
        self._compiled: Callable[..., Any] | None = None
        self._calls = [item.name for item in self.inputs if isinstance(item, CallInput)]
        self._graphs: OrderedDict[tuple[Any, ...], _Graph] = OrderedDict()
        self._layouts: dict[tuple[Any, ...], SlotLayout] = {}
        self._plans = PaddedPlans(self.inputs)

    def prepare(self, plan: SitePlan) -> PaddedPlan:
        """A plan padded to its bucket; recent ones are kept."""
        with self.in_order.on(next(iter(plan.active.values())).device):
            return self._plans.of(plan)

    def run(
        self,
        prepared: PaddedPlan,
        tensors: Values,
        slots: SlotStore,
        hoisted: Hoisted,
        strict: bool = True,
        held: Values = MappingProxyType({}),
        unread: frozenset[int] = frozenset(),
    ) -> LateTensors:
        """Replay (or first capture) the step; returned tensors are the caller's own.

        ``held`` are rows of an earlier call with this plan, as a graph returned them: padded to the same bucket.
        ``unread`` are the positions of results that the caller does not want: they are not copied out.
        ``strict`` words errors, see :func:`~fisedit_compiler.lowering.errors.lowering_error`.

        Raises:
            LoweringError: the step cannot be compiled or captured. It is not run eagerly here: that would be slow
                without anybody knowing why.
        """
        shapes = tuple(tensors[name].shape for name in self._calls)
        tensors = {**tensors, **{_held(name): rows for name, rows in held.items()}}
        key = (prepared.bucket, shapes, *(group.form for group in hoisted.groups))
        graph = self._graphs.get(key) or self._captured(key, prepared, tensors, slots, hoisted, strict)
        with self.in_order.on(tensors[self._calls[0]].device):
            if key in self._graphs:
                self._graphs.move_to_end(key)
            for name, buffer in graph.calls:
                buffer.copy_(tensors[name])
            addresses = slots.addresses(graph.layout, graph.table.device)  # kept until the replay is launched
            _fill(graph, prepared, addresses, hoisted)
            graph.graph.replay()
            return graph.owned.of(graph.outputs, prepared.counts, unread)

    @one_at_a_time
    def _captured(
        self,
        key: tuple[Any, ...],
        prepared: PaddedPlan,
        tensors: Values,
        slots: SlotStore,
        hoisted: Hoisted,
        strict: bool,
    ) -> _Graph:
        """The graph of a key, captured unless another thread did meanwhile."""
        graph = self._graphs.get(key) or self._capture(prepared, tensors, slots, hoisted, strict)
        with self.in_order.on(graph.table.device):
            self._graphs[key] = graph
            while len(self._graphs) > POOL_SIZE:
                self._graphs.popitem(last=False)
        return graph

    def _capture(
        self, prepared: PaddedPlan, tensors: Values, slots: SlotStore, hoisted: Hoisted, strict: bool
    ) -> _Graph:
        device = tensors[self._calls[0]].device
        layout = self._layout_of(slots)
        with self.in_order.on(device):  # a store may keep the table, for runs on other streams, too
            addresses = slots.addresses(layout, device)
        builder = _Inputs(self, prepared, device, layout)
        arguments = [builder.add(item, tensors, addresses.tensors, hoisted) for item in self.inputs]
        try:
            graph = builder.graph(hoisted)
            for name, buffer in graph.calls:
                buffer.copy_(tensors[name])
            _fill(graph, prepared, addresses, hoisted)
            if self._compiled is None:
                several = len(self.step.graph.output_node().all_input_nodes) > 1  # one is copied by torch
                self._compiled = compile_step(self.step, OwnedOutputs.rehearse if several else None)
            self._capture_into(graph, self._compiled, arguments)
        except Exception as error:
            raise lowering_error(error, self.step, arguments, compile_step, strict) from error
        return graph

    def _layout_of(self, slots: SlotStore) -> SlotLayout:
        """The strides that all recordings of one shape are read with: those of the first of them."""
        shapes, layout = [], {}
        for name in self.slot_names:
            value = slots[name]
            shapes.append(value.shape)
            layout[name] = value.stride()
        return self._layouts.setdefault(tuple(shapes), layout)

    def _capture_into(self, graph: _Graph, compiled: Callable[..., Any], arguments: Sequence[Tensor]) -> None:
        def body() -> list[Tensor]:
            for stager in graph.stagers:
                stager.run(graph.table)
            return list(compiled(*arguments))

        # A pool of memory ends with the last graph in it, so that it is the graphs', not kept beside them.
        memory = next((other.graph.pool() for other in self._graphs.values()), None)
        graph.outputs.extend(capture_into(graph.graph, body, memory))


def _fill(graph: _Graph, prepared: PaddedPlan, addresses: SlotAddresses, hoisted: Hoisted) -> None:
    """Bring what changed since the last replay: the host's part of it is on every call's critical path."""
    if graph.plan is not prepared or graph.filled_slots is None:
        for item, table in graph.tables.items():
            table.copy_(prepared.tables[item])
        for key, ring in graph.rings.items():
            ring.copy_(prepared.plan.ring[key])
        graph.plan = prepared
    if addresses.table is not graph.filled_slots:
        graph.slots.copy_(addresses.table)
        for name, buffer in graph.unstaged:
            buffer.copy_(addresses.tensors[name])
        graph.filled_slots = addresses.table
    for position, (group, inputs) in enumerate(zip(hoisted.groups, graph.groups, strict=True)):
        if graph.filled_groups[position]() is group:
            continue
        if inputs.entries is not None:
            inputs.entries.copy_(group.values.addresses)
        moved = [(buffer, group.values[name]) for name, buffer in inputs.buffers if buffer is not group.values[name]]
        if moved:
            torch._foreach_copy_([buffer for buffer, _ in moved], [value for _, value in moved])
        graph.filled_groups[position] = weakref.ref(group)


class _Inputs:
    """Makes a graph's inputs, one at a time, and collects how each is filled."""

    def __init__(self, pool: GraphPool, prepared: PaddedPlan, device: torch.device, layout: SlotLayout) -> None:
        self.pool, self.prepared, self.layout = pool, prepared, layout
        self.position = {name: entry for entry, name in enumerate(pool.slot_names)}
        entries = len(pool.slot_names)
        self.home: dict[str, int] = {}
        self.entries: list[slice | None] = []
        for index, bundle in enumerate(pool.bundles):
            self.home |= dict.fromkeys(bundle.values, index)
            self.entries.append(slice(entries, entries + len(bundle.values)) if bundle.per_call else None)
            if bundle.per_call:
                self.position |= {name: entries + offset for offset, name in enumerate(bundle.values)}
                entries += len(bundle.values)
        self.table = torch.zeros(entries, dtype=torch.int64, device=device)
        self.calls: list[tuple[str, Tensor]] = []
        self.unstaged: list[tuple[str, Tensor]] = []
        self.buffers: list[list[tuple[str, Tensor]]] = [[] for _ in pool.bundles]
        self.tables: dict[Input, Tensor] = {}
        self.rings: dict[ConvKey, Tensor] = {}
        self.copies: list[tuple[Tensor, int]] = []
        self.ring_jobs: list[tuple[Tensor, int, ConvKey, int]] = []

    def add(self, item: Input, tensors: Values, slots: Values, hoisted: Hoisted) -> Tensor:
        """The tensor the compiled step gets for one placeholder."""
        match item:
            case AddressInput():
                return self.table
            case AddressedInput(slot):
                return slots[slot]  # only its shape and strides are read
            case TableInput() | IotaInput():
                return self._table(item)
            case RingRowsInput(slot, key):
                return self._ring(slot, key, slots[slot])
            case CallInput(name):
                buffer = _buffer(tensors[name])
                self.calls.append((name, buffer))
                return buffer
            case HeldInput(value, dim):
                buffer = _buffer(tensors[_held(value)])
                torch._dynamo.mark_dynamic(buffer, dim)
                self.calls.append((_held(value), buffer))
                return buffer
            case SlotInput(slot):
                return self._slot(slot, slots[slot])
            case HoistedInput(name):
                return self._hoisted(name, hoisted[name])
        raise TypeError(f"a staged step has no input such as {item}")

    def _table(self, item: TableInput | IotaInput) -> Tensor:
        buffer = self.tables[item] = torch.empty_like(self.prepared.tables[item])
        if not (isinstance(item, TableInput) and item.table == "inverse"):
            torch._dynamo.mark_dynamic(buffer, 0)
        if isinstance(item, TableInput) and item.table == "taps" and item.key.in_blocks:
            torch._dynamo.mark_dynamic(buffer, 1)
        return buffer

    def _slot(self, slot: str, value: Tensor) -> Tensor:
        buffer = torch.empty_strided(value.shape, self.layout[slot], dtype=value.dtype, device=value.device)
        if is_plain(buffer):
            self.copies.append((buffer, self.position[slot]))
        else:
            self.unstaged.append((slot, buffer))
        return buffer

    def _ring(self, slot: str, key: ConvKey, canvas: Tensor) -> Tensor:
        ring = self.prepared.plan.ring[key]
        if key not in self.rings:
            self.rings[key] = torch.empty_like(ring)
        buffer = canvas.new_empty(canvas.shape[0], ring.shape[0], canvas.shape[2])
        self.ring_jobs.append((buffer, self.position[slot], key, canvas.shape[1]))
        torch._dynamo.mark_dynamic(buffer, 1)
        return buffer

    def _hoisted(self, name: str, value: Tensor) -> Tensor:
        index = self.home[name]
        bundle = self.pool.bundles[index]
        # Packed weights are a gigabyte: a graph reads them where they are.
        buffer = value if bundle.weights_only else _buffer(value)
        if bundle.per_call and is_plain(buffer) and is_plain(value):
            self.copies.append((buffer, self.position[name]))
        else:
            self.buffers[index].append((name, buffer))
        return buffer

    def graph(self, hoisted: Hoisted) -> _Graph:
        """The graph, not captured and not filled yet."""
        from fisedit_compiler.kernels.triton.stage_copies import CopyStager
        from fisedit_compiler.kernels.triton.stage_rings import RingStager

        stagers: list[CopyStager | RingStager] = []
        if self.copies:
            stagers.append(CopyStager([buffer for buffer, _ in self.copies], [entry for _, entry in self.copies]))
        for dtype in dict.fromkeys(buffer.dtype for buffer, *_ in self.ring_jobs):
            jobs = [job for job in self.ring_jobs if job[0].dtype == dtype]
            stagers.append(
                RingStager(
                    [buffer for buffer, *_ in jobs],
                    [entry for _, entry, *_ in jobs],
                    [self.rings[key] for _, _, key, _ in jobs],
                    [sites for *_, sites in jobs],
                )
            )
        groups = [
            _GroupInputs(None if entries is None else self.table[entries], tuple(buffers))
            for entries, buffers in zip(self.entries, self.buffers, strict=True)
        ]
        return _Graph(
            torch.cuda.CUDAGraph(), [], self.calls, self.table, self.table[: len(self.pool.slot_names)], self.layout,
            self.unstaged, groups, self.tables, self.rings, stagers, self.prepared,
            OwnedOutputs(self.pool.rows, self.pool.together), filled_groups=[lambda: None for _ in hoisted.groups],
        )  # fmt: skip


def _held(value: str) -> str:
    """The name of held rows among the tensors of a call."""
    return f"held:{value}"


def _buffer(value: Tensor) -> Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
