"""Cross-attention maps: dense graphs that record them, and dense graphs that take columns of them from a recording.

Before:           ``sdpa(q, k, v)`` with q spatial, k and v from a text
Recording, after: the same, and the graph also returns ``attention_map(q, k, scale)``
Reuse, after:     ``attention_with_map(q, k, v, load(map), columns, scale)``

While dense calls look for a mask, the columns of unchanged words come from the base's maps, which keeps the rest of the
picture in place (prompt-to-prompt, Hertz et al., 2022). The attention itself stays in the recording graph, so its
outputs are the module's bit for bit. The graphs are made on first use: most programs never need them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from fisedit_compiler.capture.captured import CapturedGraph
from fisedit_compiler.errors import VerificationError
from fisedit_compiler.graph import ir
from fisedit_compiler.graph.inputs import CallInput, ColumnsInput, Input, SlotInput, input_of, placeholder
from fisedit_compiler.graph.ir import copy_graph
from fisedit_compiler.graph.layout import Layout
from fisedit_compiler.graph.sizes import BATCH, TEXT
from fisedit_compiler.graph.specs import ValueSpec, spec_of
from fisedit_compiler.passes.base import slot_name
from fisedit_compiler.passes.instruments import Instruments
from fisedit_compiler.passes.rewrites.attention import SDPA, AttentionCall
from fisedit_compiler.slots.base import Slot
from fisedit_compiler.slots.map import Map

MAP = torch.ops.fisedit.attention_map.default
WITH_MAP = torch.ops.fisedit.attention_with_map.default


@dataclass(frozen=True)
class MapGraphs:
    """What recording and reusing maps needs of one program.

    Attributes:
        slots: the maps, in order of computation; ``[B, heads, S, T]``.
        tokens: ``T`` as an expression: :data:`~fisedit_compiler.graph.sizes.TEXT`, or a number.
        recording: as the program's recording graph; returns the maps last.
        reuse: the dense graph with :data:`WITH_MAP`; its own outputs alone. Placeholders of ``reuse`` and
            ``reuse_recording`` stand for tensors of the call, for maps in slots, and for the columns.
        reuse_recording: ``recording`` with :data:`WITH_MAP`; the maps it returns are those that were used.
        refusals: ``(node, module path, reason)`` of cross-attention that keeps its own map.
    """

    slots: tuple[Slot, ...]
    tokens: sympy.Expr
    recording: fx.Graph
    reuse: fx.Graph
    reuse_recording: fx.Graph
    refusals: tuple[tuple[str, str, str], ...]


def map_graphs(captured: CapturedGraph, recording: fx.Graph, instruments: Instruments) -> MapGraphs:
    """Make the graphs of a program.

    Args:
        captured: the dense graph, with layouts.
        recording: the program's recording graph, made from it.
        instruments: told about every graph.

    Raises:
        VerificationError: a graph breaks an invariant.
    """
    nodes, refusals, tokens = cross_attentions(captured.graph)
    slots = _slots(nodes)
    origins = [slot.origin for slot in slots]
    with instruments.made("recording_maps", recording, "recording") as made:
        made.graph = with_maps = copy_graph(recording)
        _record(with_maps, _same(with_maps, origins), slots)
    with instruments.made("reuse", captured.graph, "capture") as made:
        made.graph = reuse = copy_graph(captured.graph)
        _reuse(reuse, _same(reuse, origins), slots, tokens)
    with instruments.made("reuse_recording", with_maps, "recording_maps") as made:
        made.graph = reuse_recording = copy_graph(with_maps)
        _reuse(reuse_recording, _same(reuse_recording, origins), slots, tokens)
    graphs = MapGraphs(slots, tokens, with_maps, reuse, reuse_recording, refusals)
    verify_maps(graphs)
    return graphs


def cross_attentions(
    graph: fx.Graph,
) -> tuple[list[fx.Node], tuple[tuple[str, str, str], ...], sympy.Expr]:
    """Attention from sites to one text, what keeps its own map and why, and the text's number of tokens."""
    found: list[fx.Node] = []
    refusals: list[tuple[str, str, str]] = []
    for node in ir.nodes_calling(graph, [SDPA]):
        layout = node.meta.get("layout")
        if not (isinstance(layout, Layout) and layout.is_rows and node.meta.get("varies")):
            continue
        call = AttentionCall.read(node)
        if call.is_self():
            continue
        reason = _problem(call)
        if reason is None:
            found.append(node)
        else:
            refusals.append((node.name, ir.path_of(node), reason))
    lengths = Counter(_tokens(node) for node in found)
    if not lengths:
        return [], tuple(refusals), sympy.Integer(0)
    tokens = TEXT if TEXT in lengths else lengths.most_common(1)[0][0]
    for node in [node for node in found if _tokens(node) != tokens]:
        reason = f"it has {_tokens(node)} keys, not one for each of the text's {tokens} tokens"
        refusals.append((node.name, ir.path_of(node), reason))
        found.remove(node)
    return found, tuple(refusals), tokens


def _problem(call: AttentionCall) -> str | None:
    if call.problem() is not None:
        return call.problem()
    for name, operand in (("keys", call.key), ("values", call.value)):
        if operand.meta["layout"].kind != "plain":
            return f"{name} are {operand.meta['layout']}"
    if call.mask is not None:
        return "an attention mask is given"
    if not call.is_plain():
        return "heads or samples share keys: they are not [batch, heads, tokens, channels] of their own"
    return None


def _tokens(node: fx.Node) -> sympy.Expr:
    return sympy.sympify(spec_of(AttentionCall.read(node).key).shape[2])


def _slots(nodes: Iterable[fx.Node]) -> tuple[Slot, ...]:
    slots: dict[str, Slot] = {}
    for node in nodes:
        slot = Slot(slot_name(node, "map"), node.meta["origin"], Map(), node.meta["layout"])
        if slot.name in slots:  # one module called twice
            slot = replace(slot, name=f"{slot.name}.{slot.origin}")
        slots[slot.name] = slot
    return tuple(slots.values())


def _same(graph: fx.Graph, origins: list[str]) -> list[fx.Node]:
    """The attention nodes of a copy of the captured graph that come from these nodes of it."""
    nodes = {node.meta["origin"]: node for node in ir.nodes_calling(graph, [SDPA])}
    return [nodes[name] for name in origins]


def _map_spec(node: fx.Node, tokens: sympy.Expr | None = None) -> ValueSpec:
    call = AttentionCall.read(node)
    length = spec_of(call.key).shape[2] if tokens is None else tokens
    return ValueSpec((*spec_of(call.query).shape[:3], length), spec_of(call.query).dtype)


def _record(graph: fx.Graph, nodes: list[fx.Node], slots: Iterable[Slot]) -> None:
    maps: dict[str, fx.Node] = {}
    for node, slot in zip(nodes, slots, strict=True):
        call = AttentionCall.read(node)
        with graph.inserting_after(node):
            item = ir.call(graph, MAP, (call.query, call.key, call.scale), spec=_map_spec(node), source=node)
            item.meta.update(layout=node.meta["layout"], varies=True)
            maps[slot.name] = slot.store(graph, item, maps.__getitem__)
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = ((*_flat(output.args[0]), *maps.values()),)
    graph.lint()


def _reuse(graph: fx.Graph, nodes: list[fx.Node], slots: Iterable[Slot], tokens: sympy.Expr) -> None:
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node in placeholders:
        node.meta["input"] = CallInput(node.name)
    last = columns = _input(graph, placeholders[-1], "columns", ColumnsInput(), ValueSpec((BATCH, tokens), torch.int64))
    # The base's text may have another number of tokens: whatever it is, it is only read through the columns.
    base_tokens = sympy.Symbol("t_base", positive=True, integer=True)
    for node, slot in zip(nodes, slots, strict=True):
        name = "slot_" + re.sub(r"\W", "_", slot.name)
        last = recorded = _input(graph, last, name, SlotInput(slot.name), _map_spec(node, base_tokens))
        recorded.meta["layout"] = slot.layout
        call = AttentionCall.read(node)
        arguments = (call.query, call.key, call.value, recorded, columns, call.scale)
        with graph.inserting_before(node):
            mixed = ir.call(graph, WITH_MAP, arguments, spec=spec_of(node), source=node)
        mixed.meta.update(layout=node.meta["layout"], varies=True)
        for reader in ir.nodes_calling(graph, [MAP]):
            if reader.args[0] is call.query and reader.args[1] is call.key:
                reader.args = (*reader.args[:3], recorded, columns)
        node.replace_all_uses_with(mixed)
        graph.erase_node(node)
    graph.lint()


def _input(graph: fx.Graph, last: fx.Node, name: str, item: Input, spec: ValueSpec) -> fx.Node:
    with graph.inserting_after(last):
        node = placeholder(graph, ir.unused_name(graph, name), item)
    node.meta["spec"] = spec
    return node


def _flat(outputs: Any) -> tuple[Any, ...]:
    return tuple(outputs) if isinstance(outputs, (list, tuple)) else (outputs,)


def verify_maps(graphs: MapGraphs) -> None:
    """Check that every map is stored once and in order, and that each graph reads it where it was stored.

    Raises:
        VerificationError: names the graph and the slot.
    """
    count = len(graphs.slots)
    for title, graph in (("recording_maps", graphs.recording), ("reuse_recording", graphs.reuse_recording)):
        outputs = _flat(next(node for node in graph.nodes if node.op == "output").args[0])
        for node, slot in zip(outputs[len(outputs) - count :], graphs.slots, strict=True):
            if node.target is not MAP or node.meta["origin"] != slot.origin:
                raise _broken(title, slot, f"is stored from {ir.describe(node)}")
    for title, graph in (("reuse", graphs.reuse), ("reuse_recording", graphs.reuse_recording)):
        mixed = {node.meta["origin"]: node for node in ir.nodes_calling(graph, [WITH_MAP])}
        for slot in graphs.slots:
            if slot.origin not in mixed:
                raise _broken(title, slot, "is read by nothing")
            read = [input_of(node) for node in mixed[slot.origin].args[3:5]]
            if read != [SlotInput(slot.name), ColumnsInput()]:
                raise _broken(title, slot, f"is not what {ir.describe(mixed[slot.origin])} reads")


def _broken(title: str, slot: Slot, problem: str) -> VerificationError:
    return VerificationError(f"cross_attention_maps, graph {title}: slot {slot.name} {problem}. This is a defect here.")
