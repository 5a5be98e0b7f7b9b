"""A compiled program bound to a module's weights, ready to run, for any number of runs at once.

Binding shares the module's own parameters (never copies) and notices when the module replaced one. Which run is made
and what is recorded is decided in ``edit_session.py`` and ``record_session.py``.

What runs share, they change one at a time: hoisted values and the buffers of CUDA graphs ``in_order``, graphs and plans
under a lock that nobody holds while something is computed. A graph module is only read, so steps that are interpreted
run side by side.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from operator import attrgetter
from types import MappingProxyType
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fisedit_compiler.compiling import one_at_a_time
from fisedit_compiler.config import SparsifyConfig
from fisedit_compiler.errors import LoweringError
from fisedit_compiler.geometry.site_plan import SitePlan
from fisedit_compiler.graph.inputs import Sources
from fisedit_compiler.lowering.lowered import Lowerable
from fisedit_compiler.lowering.program import CompiledProgram
from fisedit_compiler.passes.programs.hoist import Bundle
from fisedit_compiler.recordings.stores import SlotStore
from fisedit_compiler.runtime.execution.backend import ProgramBackend
from fisedit_compiler.runtime.execution.cuda_graphs import GraphPool, HoistedNames
from fisedit_compiler.runtime.execution.dense_graphs import DenseGraphs
from fisedit_compiler.runtime.execution.graph_choice import GraphChoice, choose_graph, kept_by_edits
from fisedit_compiler.runtime.execution.held_rows import HeldRows, cut_of
from fisedit_compiler.runtime.execution.hoisting import HoistCache, Hoisted
from fisedit_compiler.runtime.execution.in_order import InOrder
from fisedit_compiler.runtime.execution.interpreted import InterpretedGraphs
from fisedit_compiler.runtime.execution.padded_plans import SitePlans
from fisedit_compiler.runtime.samples.recorded_samples import are_first, are_independent
from fisedit_compiler.runtime.samples.sample_axes import BatchAxes, batch_axes
from fisedit_compiler.tensors.contents import Later
from fisedit_compiler.tensors.late import LateMapping
from fisedit_compiler.tensors.own import own

PER_CALL = frozenset({"timestep"})
"""Inputs that change from call to call."""


class Executable:
    """One compiled program on one module.

    Graph modules are made on first use: an edit does not pay for the recording graph, nor the reverse.
    """

    def __init__(self, program: CompiledProgram, module: nn.Module, config: SparsifyConfig) -> None:
        self.program, self.module, self.config = program, module, config
        self.confirmed: set[tuple[Any, ...]] = set()
        """Forms of inputs for which it was compared with the module and found equal."""
        self.unsettled: tuple[str, ...] = ()
        """Places that the module's forward writes anew at every call, so that every recorded call is compared."""
        self.backend = ProgramBackend(config, type(module).__name__)
        self.in_order = InOrder()
        self._lock = threading.RLock()
        self.hoisted = HoistCache(PER_CALL, graphs=config.backend != "eager")
        self.dense = DenseGraphs(type(module).__name__)
        self.slot_names = tuple(slot.name for slot in program.slots)
        samples = [s.name for s in program.slots if s.origin == program.spatial[0] and s.kind.holds == "packed"]
        self.sample_slot = samples[0] if samples else None
        self._graphs: dict[str, fx.GraphModule] = {}
        self._interpreted = InterpretedGraphs(self._graphs, self._lock)
        weights = [place for place, bundle in enumerate(program.bundles) if not bundle.dependences]
        self._weights = weights[0] if weights else None
        self._bundles: list[tuple[Bundle, fx.GraphModule]] = []
        self._attributes: dict[str, Any] = {}
        self._pools: dict[Lowerable, GraphPool] = {}
        self._choices: dict[tuple[bool, ...], GraphChoice] = {}
        self.plans = SitePlans(program, config)

    # -- weights ---------------------------------------------------------------------------------

    def rebind(self, tensors: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """Follow parameters and buffers that the module replaced since the graphs were bound.

        ``tensors`` are the module's by path, as far as they were read just now: walking to each of them through the
        module takes ten times as long.
        """
        with self._lock:
            kept = self._attributes.items()
            if any(tensors.get(name) is not bound and self._resolve(name) is not bound for name, bound in kept):
                self.unbind()

    def unbind(self) -> None:
        """Let go of the module's parameters; the program is bound to those of the moment at its next call."""
        with self._lock:
            if not self._attributes:
                return
            self._graphs.clear()
            self._interpreted.clear()
            self.dense.drop()
            self._bundles = []
            self._drop_pools()
            self._attributes.clear()
        self.hoisted.clear()

    def _resolve(self, name: str) -> Any:
        constant = self.program.constants.get(name)
        return constant if constant is not None else attrgetter(name)(self.module)

    def _bind(self, graph: fx.Graph) -> fx.GraphModule:
        attributes = {
            str(node.target): self._resolve(str(node.target)) for node in graph.nodes if node.op == "get_attr"
        }
        self._attributes.update(attributes)
        bound = fx.GraphModule(dict(attributes), graph)
        return bound.eval()

    def _graph(self, name: str) -> fx.GraphModule:
        return self._graphs.get(name) or self._bound_graph(name)

    @one_at_a_time
    def _bound_graph(self, name: str) -> fx.GraphModule:
        graph = attrgetter(name)(self.program)
        with self._lock:  # bound and kept at once: what is kept of exchanged parameters would never be noticed
            return self._graphs.get(name) or self._graphs.setdefault(name, self._bind(graph))

    def _run(self, name: str, sources: Sources) -> tuple[Sequence[Any], list[Any]]:
        """What a graph returns for a call, and the arguments it was given."""
        return self._interpreted.run(name, self._graph(name), sources)

    def _run_step(self, name: str, sources: Sources, hoisted: Hoisted) -> Sequence[Any]:
        """What a sparse graph returns for a call that is interpreted."""
        sample = sources.call[self.program.spatial[0]]
        if self._weights is None or not sample.is_cpu:
            return self._run(name, sources)[0]
        return self._interpreted.run_on_host(name, self._graph(name), sources, hoisted.groups[self._weights])

    def _bundle_modules(self) -> list[tuple[Bundle, fx.GraphModule]]:
        return self._bundles or self._bound_bundles()

    @one_at_a_time
    def _bound_bundles(self) -> list[tuple[Bundle, fx.GraphModule]]:
        with self._lock:
            if not self._bundles:
                self._bundles = [(bundle, self._bind(bundle.graph)) for bundle in self.program.bundles]
            return self._bundles

    # -- runs ------------------------------------------------------------------------------------

    def record(
        self, tensors: Mapping[str, Tensor], *, maps: bool = False, compiled: bool = False
    ) -> tuple[list[Any], dict[str, Tensor]]:
        """The dense call: the model's flat outputs, and every slot; with ``maps`` also the cross-attention maps.

        ``compiled`` asks for compiled code, whose results are the interpreted ones up to rounding; see
        :meth:`expect_dense`.
        """
        if compiled and not maps:
            count = len(self.program.outputs) + len(self.slot_names)
            flat = self._compiled(tensors, count)
            if flat is not None:
                return self._divide(flat, self.slot_names)
        return self.interpret(tensors, maps=maps)

    def interpret(self, tensors: Mapping[str, Tensor], *, maps: bool = False) -> tuple[list[Any], dict[str, Tensor]]:
        """What :meth:`record` gives, of the graph as nothing has compiled it: the module's own outputs bit for bit."""
        arguments = self._arguments(tensors)
        return self._stored(self._graph("maps.recording" if maps else "recording")(*arguments), arguments)

    def outputs(self, tensors: Mapping[str, Tensor]) -> list[Any] | None:
        """The flat outputs of a dense call as compiled code; ``None`` where that fails, for the module itself."""
        return self._compiled(tensors, len(self.program.outputs))

    def _compiled(self, tensors: Mapping[str, Tensor], count: int) -> list[Any] | None:
        def packed() -> dict[str, Tensor]:
            hoisted = self._hoisted(self.hoisted, tensors, {}, None, weights_only=True)
            return {path: hoisted[name] for path, name in self.program.packed_weights.items()}

        return self.dense.run(lambda: self._graph("recording"), self._arguments(tensors), count, packed)

    def expect_dense(self, tensors: Mapping[str, Tensor]) -> bool:
        """A run of dense calls with such tensors begins; says whether they are to be compiled ones.

        The second run of a size is worth a compilation. Whoever asks keeps the answer for the whole run, since another
        thread's may be the second one meanwhile.
        """
        return self.is_lowered(tensors) and self.dense.expect(self._arguments(tensors))

    def knows_dense(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether there is compiled code for dense calls with such tensors."""
        return self.is_lowered(tensors) and self.dense.know(self._arguments(tensors))

    def is_as_close(self, tensors: Mapping[str, Tensor], own: Sequence[Any], compiled: Sequence[Any]) -> bool:
        """See :meth:`DenseGraphs.is_as_close`."""
        return self.dense.is_as_close(self._arguments(tensors), own, compiled)

    def _arguments(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        return [tensors[spec.identifier()] for spec in self.program.signature.tensors]

    def reuse(
        self, tensors: Mapping[str, Tensor], maps: Mapping[str, Tensor], columns: Tensor, *, record: bool
    ) -> tuple[list[Any], dict[str, Tensor]]:
        """The dense call with columns of recorded cross-attention maps.

        Args:
            tensors: of the call, by placeholder name.
            maps: the recorded maps by slot name, of the same samples.
            columns: int64 ``[B, T]``: for every token the recorded column, or -1 for its own.
            record: also return every slot, and the maps as they were used.
        """
        name = "maps.reuse_recording" if record else "maps.reuse"
        return self._stored(*self._run(name, Sources(call=tensors, slots=maps, columns=columns)))

    def _stored(self, flat: Sequence[Any], arguments: Sequence[Any]) -> tuple[list[Any], dict[str, Tensor]]:
        """The outputs of a dense call, and its slots, with its maps if there are any, as tensors of their own."""
        names: tuple[str, ...] = self.slot_names
        if len(flat) == len(self.program.outputs):
            names = ()
        elif len(flat) > len(self.program.outputs) + len(names):
            names = (*names, *self.map_names)
        outputs, stored = self._divide(flat, names)
        borrowed = [*arguments, *(value for value in outputs if isinstance(value, Tensor))]
        return outputs, {name: own(value, borrowed) for name, value in stored.items()}

    def step(
        self,
        tensors: Mapping[str, Tensor],
        slots: SlotStore,
        plan: SitePlan,
        *,
        update: bool,
        scalars: Mapping[str, float] | None = None,
        strict: bool = False,
        later: Later | None = None,
        hoisted: HoistCache | None = None,
        held: HeldRows | None = None,
        shallow: bool = False,
    ) -> tuple[list[Any], Mapping[str, Tensor]]:
        """The sparse call; with ``update`` also what it changes of its slots, by name (see ``program.updates``).

        ``scalars`` and ``later`` are those of :meth:`HoistCache.evaluate`; ``hoisted`` is a cache of the caller's own.
        With ``held`` the program has a cut. A full call keeps its rows there. A ``shallow`` one takes them from there,
        where they :meth:`~.held_rows.HeldRows.fit`, and changes only the slots of ``program.reuse.updates``.
        With ``backend="auto"`` a call that cannot be lowered is made again eagerly, as all later ones are.

        Raises:
            LoweringError: it cannot be lowered, and the backend is ``"inductor"`` or ``strict`` is set.
        """
        strict = strict or self.backend.is_strict
        given = (tensors, slots, plan, update, scalars or {}, strict, later, hoisted, held, shallow)
        try:
            return self._step(*given)
        except LoweringError as error:
            if strict:
                raise
            self.backend.give_up(error)
        # Outside of the handler: the error's frames hold what the attempt had allocated.
        self._drop_pools()
        self.hoisted.run_eagerly()
        return self._step(*given)

    def _step(
        self,
        tensors: Mapping[str, Tensor],
        slots: SlotStore,
        plan: SitePlan,
        update: bool,
        scalars: Mapping[str, float],
        strict: bool,
        later: Later | None,
        cache: HoistCache | None,
        held: HeldRows | None,
        shallow: bool,
    ) -> tuple[list[Any], Mapping[str, Tensor]]:
        lowered = self.is_lowered(tensors)
        if not lowered and self.backend.refused is not None:
            self.hoisted.run_eagerly()
        hoisted = self._hoisted(cache or self.hoisted, tensors, scalars, later)
        lowered = lowered and not plan.is_empty
        chosen = self._choose(update=update, cut=held is not None, shallow=shallow, lowered=lowered)
        rows = {} if held is None or not shallow else held.rows(self.program, plan, padded=lowered)
        keeping = None if shallow else held
        count = 0 if keeping is None else len(cut_of(self.program).values)
        if lowered:
            pool = self._graph_pool(chosen.name)
            owned = pool.run(pool.prepare(plan), tensors, slots, hoisted, strict, rows, chosen.unread)
            if keeping is not None:
                keeping.keep(owned[-count:], self.program, plan, tensors[self.program.spatial[0]])
            return owned[: len(self.program.outputs)], LateMapping(owned, chosen.places)
        flat = self._run_step(chosen.name, Sources(tensors, slots, hoisted, plan, held=rows), hoisted)
        if keeping is not None:
            flat, kept = flat[:-count], [own(value, flat[:-count]) for value in flat[-count:]]
            keeping.keep(kept, self.program, plan, tensors[self.program.spatial[0]])
        outputs, stored = self._divide(flat, chosen.updates)
        if any(output.slot is None for output in self.program.outputs):
            # An output without sites may be a hoisted value itself, or a view of one.
            kept = [*hoisted.values(), *slots.values()]
            outputs = [own(value, kept) if isinstance(value, Tensor) else value for value in outputs]
        # The caller gets the outputs and may write to them; what is recorded must not follow.
        return outputs, {name: own(value, outputs) for name, value in stored.items()}

    def _hoisted(
        self,
        cache: HoistCache,
        tensors: Mapping[str, Tensor],
        scalars: Mapping[str, float],
        later: Later | None,
        weights_only: bool = False,
    ) -> Hoisted:
        # Asked before the modules are: they may be those of weights that another run finds exchanged meanwhile.
        generation, bundles = cache.generation, self._bundle_modules()
        if weights_only:
            bundles = [pair for pair in bundles if not pair[0].dependences]
        sample = tensors[self.program.spatial[0]]
        with self.in_order.on(sample.device):
            hoisted = cache.evaluate(bundles, tensors, sample.shape[0], scalars, later, generation)
        cache.capture_wanted()
        return hoisted

    def is_lowered(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether a call with these tensors runs as Inductor and CUDA graphs make it, not interpreted."""
        return self.backend.on(tensors[self.program.spatial[0]].device) == "inductor"

    def interpreted_step(self) -> fx.GraphModule:
        """The graph of a lowered step on the module's weights, as nothing has compiled or staged it."""
        return self._graph(self._choose(update=False, cut=False, shallow=False, lowered=True).name)

    def _choose(self, *, update: bool, cut: bool, shallow: bool, lowered: bool) -> GraphChoice:
        program, reuses = self.program, self.config.reuse != "off"
        key = (update, cut, shallow, lowered, program.has_reuse)
        if key not in self._choices:
            self._choices[key] = choose_graph(
                program, update=update, cut=cut, shallow=shallow, lowered=lowered, reuses=reuses
            )
        return self._choices[key]

    def _graph_pool(self, name: Lowerable) -> GraphPool:
        """The pool of one of the graphs that are lowered; each is compiled on first use."""
        return self._pools.get(name) or self._make_pool(name)

    def _drop_pools(self) -> None:
        self._pools.clear()

    @one_at_a_time
    def _make_pool(self, name: Lowerable) -> GraphPool:
        program = self.program
        bundles = [
            HoistedNames(bundle.values, bool(bundle.dependences & PER_CALL), not bundle.dependences)
            for bundle in program.bundles
        ]
        rows, together = kept_by_edits(program, name)
        lowered = program.lowered(name)
        with self._lock:
            pool = self._pools.get(name)
            if pool is None:
                pool = GraphPool(self._bind(lowered), program.slots_of(name), bundles, rows, self.in_order, together)
                self._pools[name] = pool
            return pool

    def base_outputs(self, slots: Mapping[str, Tensor]) -> list[Tensor] | None:
        """The recorded outputs, or ``None`` if an output is not spatial and so not recorded."""
        names = [output.slot for output in self.program.outputs]
        if any(name is None for name in names):
            return None
        return [slots[str(name)].clone() for name in names]

    def _divide(self, flat: Sequence[Any], names: Sequence[str]) -> tuple[list[Any], dict[str, Tensor]]:
        count = len(self.program.outputs)
        return list(flat[:count]), dict(zip(names, flat[count:], strict=True))

    @cached_property
    def batch_axes(self) -> tuple[BatchAxes, BatchAxes]:
        """The batch axis of every slot's value, and of its rows; for errors see :func:`~.sample_axes.batch_axes`."""
        return batch_axes(self.program)

    def assemble(self, outputs: list[Any]) -> Any:
        """The model's own output structure from flat outputs."""
        return pytree.tree_unflatten(outputs, self.program.treespec)

    @property
    def map_names(self) -> tuple[str, ...]:
        """The slots of cross-attention maps."""
        return tuple(slot.name for slot in self.program.maps.slots)

    @cached_property
    def independent_samples(self) -> bool:
        """Whether a call may be made with some samples of its batch only, and its slots be composed of samples."""
        program = self.program
        return are_independent(program.captured.graph, program.signature) and are_first(program.slots)

    def text_length(self, tensors: Mapping[str, Tensor]) -> int:
        """How many tokens a call's text has: columns of its cross-attention maps."""
        tokens = self.program.maps.tokens
        if tokens.is_Integer:
            return int(tokens)
        spec = next(spec for spec in self.program.signature.tensors if "t" in spec.axes)
        return int(tensors[spec.identifier()].shape[spec.axes.index("t")])
