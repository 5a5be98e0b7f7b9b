"""A compiled program: every graph one call signature needs, and what they must be given.

``compile_program`` is the pipeline of the compiler in one function: capture, rewrite, hoist. Running programs is
``runtime/``'s business, keeping them on disk is ``capture/cache/``'s.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from itertools import islice
from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn

from fisedit_compiler.capture import cache
from fisedit_compiler.capture.captured import CapturedGraph
from fisedit_compiler.capture.export import capture
from fisedit_compiler.compiling import made_once, one_at_a_time
from fisedit_compiler.config import SparsifyConfig
from fisedit_compiler.errors import ConfigError, SlotKindError
from fisedit_compiler.geometry.block_sizes import ConvLayer
from fisedit_compiler.geometry.conv_tables import ConvKey
from fisedit_compiler.graph import ir
from fisedit_compiler.graph.inputs import TableInput, graph_inputs, key_of
from fisedit_compiler.graph.signatures import CallSignature
from fisedit_compiler.graph.specs import spec_of
from fisedit_compiler.lowering.dense import packed_weights
from fisedit_compiler.lowering.lowered import Lowerable, lowered_graph
from fisedit_compiler.passes import rewrite
from fisedit_compiler.passes.base import Program
from fisedit_compiler.passes.instruments import Instruments, Observer, PassReport
from fisedit_compiler.passes.instruments import operations as operations_of
from fisedit_compiler.passes.programs.hoist import Bundle, hoist
from fisedit_compiler.passes.programs.maps import MapGraphs, map_graphs
from fisedit_compiler.passes.programs.recording import SlotUpdate, recording_graph, with_updates
from fisedit_compiler.passes.programs.reuse import Cut, ReuseGraphs, find_cut, reuse_graphs
from fisedit_compiler.passes.simplify import simplify
from fisedit_compiler.progress import compiling
from fisedit_compiler.slots.base import Slot

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OutputSpec:
    """One flat output of the model: the slot that holds its base value, if it is spatial."""

    slot: str | None


@dataclass
class CompiledProgram:
    """Everything compiled for one call signature.

    Attributes:
        signature: the call it serves.
        multiple: divisor of height and width.
        recording: dense graph; returns the model's flat outputs, then every slot in order.
        step: sparse graph; returns the model's flat outputs.
        update: sparse graph; returns the model's flat outputs, then what an edit changes of its slots.
        updates: what ``update`` returns behind the outputs, in order.
        bundles: hoisted values of ``step`` and ``update``, in order of computation.
        slots: what a recording stores per call, in order.
        outputs: one entry per flat output.
        convs: convolution geometries the site plan must table.
        levels: levels the site plan must cover.
        layers: the sparse convolutions, in order of computation.
        constants: tensors the graphs close over that the module does not own.
        treespec: how flat outputs are put together (``torch.utils._pytree``).
        refusals: ``(node, module path, operation, reason)`` of every operation that stays dense.
        reports: what each pass did.
        operations: number of call nodes captured, per operation.
        seconds: wall time of capture and of rewriting.
        from_cache: whether the capture came from disk.
        captured: the dense graph that the program was made from; its nodes' names are the origins of the others.
        config: what it was compiled with.
    """

    signature: CallSignature
    multiple: int
    recording: fx.Graph
    step: fx.Graph
    update: fx.Graph
    updates: tuple[SlotUpdate, ...]
    bundles: list[Bundle]
    slots: tuple[Slot, ...]
    outputs: tuple[OutputSpec, ...]
    convs: frozenset[ConvKey]
    levels: frozenset[Fraction]
    layers: tuple[ConvLayer, ...]
    constants: dict[str, torch.Tensor]
    treespec: Any
    captured: CapturedGraph
    config: SparsifyConfig
    refusals: tuple[tuple[str, str, str, str], ...] = ()
    reports: list[PassReport] = field(default_factory=list)
    operations: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    from_cache: bool = False
    _lowered: dict[str, fx.Graph] = field(default_factory=dict, repr=False)

    @property
    def spatial(self) -> tuple[str, ...]:
        """Placeholder names of the spatial inputs, the one that sets height and width first."""
        return self.signature.spatial_names

    @cached_property
    def packed_weights(self) -> dict[str, str]:
        """See :func:`~.dense.packed_weights`."""
        return packed_weights(self.bundles)

    def lowered(self, name: Lowerable) -> fx.Graph:
        """What Inductor gets of a graph of the program; made on first use, which ``reports`` then tell."""
        return made_once(self._lowered, name, lambda: self.make_lowered(name, Instruments()))

    @one_at_a_time
    def make_lowered(self, name: Lowerable, instruments: Instruments) -> fx.Graph:
        """Make what :meth:`lowered` gives under the eyes of ``instruments``."""
        graph = lowered_graph(name, attrgetter(name)(self), self.slots_of(name), instruments)
        self.reports.extend(instruments.reports)
        return graph

    def slots_of(self, name: Lowerable) -> tuple[str, ...]:
        """The slots that a graph may read, in order: a shallow call is not to bring others near."""
        deep = self.cut.deep if "shallow" in name and isinstance(self.cut, Cut) else frozenset()
        return tuple(slot.name for slot in self.slots if slot.name not in deep)

    @property
    def maps(self) -> MapGraphs:
        """Graphs that record and reuse cross-attention maps; made on first use, which ``reports`` then tell."""
        return made_once(self.__dict__, "maps", lambda: self.make_maps(Instruments()))

    @property
    def has_maps(self) -> bool:
        """Whether :attr:`maps` were made already."""
        return "maps" in self.__dict__

    @one_at_a_time
    def make_maps(self, instruments: Instruments) -> MapGraphs:
        """Make :attr:`maps` under the eyes of ``instruments``."""
        graphs = map_graphs(self.captured, self.recording, instruments)
        self.reports.extend(instruments.reports)
        return graphs

    @cached_property
    def cut(self) -> Cut | str:
        """Where a call may take what comes from coarser levels from an earlier one, or why it cannot, in words."""
        return find_cut(self.captured.graph, self.step, {slot.name: slot for slot in self.slots})

    @property
    def reuse(self) -> ReuseGraphs:
        """The graphs cut at :attr:`cut`, which there must be; made on first use, which ``reports`` then tell."""
        return made_once(self.__dict__, "reuse", lambda: self.make_reuse(Instruments()))

    @property
    def has_reuse(self) -> bool:
        """Whether :attr:`reuse` was made already."""
        return "reuse" in self.__dict__

    @one_at_a_time
    def make_reuse(self, instruments: Instruments) -> ReuseGraphs:
        """Make :attr:`reuse` under the eyes of ``instruments``."""
        assert isinstance(self.cut, Cut), self.cut
        graphs = reuse_graphs(self.step, self.update, self.updates, self.cut, instruments)
        self.reports.extend(instruments.reports)
        return graphs


@one_at_a_time
def compile_program(
    module: nn.Module,
    arguments: dict[str, Any],
    signature: CallSignature,
    config: SparsifyConfig,
    multiple: int | None,
    structure: str = "",
    *,
    fresh: bool = False,
) -> CompiledProgram:
    """Capture ``module`` for a call (or take the capture from disk) and compile it.

    ``structure`` is the module's structure key; without one, or with ``config.cache`` off, the disk is not used.
    With ``fresh`` a capture on disk is not taken but replaced.

    Raises:
        CaptureError: the module cannot be captured.
        LayoutError: an output mixes sites.
    """
    start = time.perf_counter()
    entry = cache.entry_path(structure, signature, multiple) if structure and config.cache else None
    captured = cache.load(entry, signature) if entry and not fresh else None
    captured_at = time.perf_counter()
    lowered = any(config.backend_on(tensor.device.type) == "inductor" for tensor in islice(module.parameters(), 1))
    compiled = None
    if captured is not None:
        with compiling("rewrite", lowered):
            compiled = _compile_cached(captured, config, captured_at - start)
    cached = compiled is not None
    if captured is None or compiled is None:
        with compiling("capture", lowered):
            captured = capture(module, arguments, signature, multiple)
            with Instruments().watch("simplify", captured.graph):
                simplify(captured)
        if entry:
            cache.save(entry, captured)
        captured_at = time.perf_counter()
        with compiling("rewrite", lowered):
            compiled = compile_captured(captured, config, capture_seconds=captured_at - start)
    compiled.operations = dict(operations_of(captured.graph))
    compiled.seconds = {"capture": captured_at - start, "rewrite": time.perf_counter() - captured_at}
    compiled.from_cache = cached
    return compiled


def _compile_cached(captured: CapturedGraph, config: SparsifyConfig, seconds: float) -> CompiledProgram | None:
    """Compile a capture from disk; ``None`` if that fails, since the fault may be the file's."""
    try:
        return compile_captured(captured, config, capture_seconds=seconds)
    except (ConfigError, SlotKindError):
        raise  # the user's mistake, or a kind's: another capture would meet it, too
    except Exception as error:
        logger.warning(
            "a capture from disk could not be compiled (%s: %s); the model is captured again",
            type(error).__name__,
            error,
        )
        return None


@one_at_a_time
def compile_captured(
    captured: CapturedGraph, config: SparsifyConfig, observe: Observer | None = None, *, capture_seconds: float = 0.0
) -> CompiledProgram:
    """Compile a captured and simplified graph.

    Args:
        captured: the dense graph.
        config: how to rewrite it.
        observe: sees the captured graph, the graph after every pass, the recording graph, the step with its stores, and
            the update and step graph.
        capture_seconds: what capturing (or reading the capture from disk) took, for the reports.

    Raises:
        LayoutError: an output mixes sites.
        VerificationError: a pass left a graph that breaks an invariant.
    """
    instruments = Instruments(observe)
    instruments.report(PassReport("capture", capture_seconds, {}, dict(operations_of(captured.graph))), captured.graph)
    return _assemble(captured, rewrite(captured, config, instruments), instruments)


def _assemble(captured: CapturedGraph, program: Program, instruments: Instruments) -> CompiledProgram:
    spatial = captured.signature.spatial_names
    with instruments.made("recording", captured.graph, "capture") as made:
        made.graph = recording = recording_graph(program)
    with instruments.made("stores", program.graph, "lower") as made:
        with_stores, updates = with_updates(program)
        made.graph = with_stores
    with instruments.made("update", with_stores, "stores") as made:
        update, update_bundles = hoist(with_stores, spatial)
        made.graph = update
    with instruments.made("step", program.graph, "lower") as made:
        step, bundles = hoist(program.graph, spatial)
        made.graph = step
    # The update graph only adds work on recorded values, so both hoist the same; should a slot's update ever need
    # more, it is in the update graph's bundles.
    known = {bundle.name: bundle for bundle in bundles} | {bundle.name: bundle for bundle in update_bundles}
    inputs = [*graph_inputs(step), *graph_inputs(update)]
    keys = [item.key for item in inputs if isinstance(item, TableInput)]
    convs = frozenset(key for key in keys if isinstance(key, ConvKey))
    levels = frozenset(key for key in keys if isinstance(key, Fraction))
    levels |= {level for key in convs for level in (key.source, key.target)} | {Fraction(1)}
    levels |= {level for update in updates if (level := program.slots[update.slot].layout.level) is not None}
    return CompiledProgram(
        signature=captured.signature,
        multiple=captured.multiple,
        recording=recording,
        step=step,
        update=update,
        updates=updates,
        bundles=list(known.values()),
        slots=tuple(program.slots.values()),
        outputs=_outputs(program),
        convs=convs,
        levels=levels,
        layers=_layers(program.graph),
        constants=captured.constants,
        treespec=captured.treespec,
        captured=captured,
        config=program.config,
        refusals=_refusals(program),
        reports=instruments.reports,
    )


def _outputs(program: Program) -> tuple[OutputSpec, ...]:
    output = next(node for node in program.graph.nodes if node.op == "output")
    flat = output.args[0]
    values = flat if isinstance(flat, (list, tuple)) else (flat,)
    return tuple(OutputSpec(value.meta.get("updates") if isinstance(value, fx.Node) else None) for value in values)


def _layers(graph: fx.Graph) -> tuple[ConvLayer, ...]:
    layers = []
    for node in ir.nodes_calling(graph, [torch.ops.fisedit.conv2d_sites.default]):
        weight = node.args[5]
        assert isinstance(weight, fx.Node)
        key: ConvKey = key_of(node.args[3])
        out_channels, inputs = (int(size) for size in spec_of(weight).shape)
        layers.append(ConvLayer(key, inputs // (key.kernel[0] * key.kernel[1]), out_channels))
    return tuple(layers)


def _refusals(program: Program) -> tuple[tuple[str, str, str, str], ...]:
    nodes = {node.name: node for node in program.captured.graph.nodes}
    return tuple(
        (name, ir.path_of(nodes[name]) if name in nodes else "", ir.target_name(nodes[name].target), reason)
        for name, reason in program.refusals.items()
        if name in nodes
    )
