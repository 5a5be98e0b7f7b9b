"""The verifier: what must hold of the working graph after every pass, and at the end of rewriting.

A failure here is a defect of a pass, not of the user's model; the message names the pass and the node.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import torch
from torch import fx

from fisedit_compiler.errors import VerificationError
from fisedit_compiler.graph import ir
from fisedit_compiler.graph.layout import Layout
from fisedit_compiler.graph.specs import ValueSpec, has_spec, spec_of
from fisedit_compiler.passes.base import NO_LAYOUT, Program
from fisedit_compiler.slots.asking import refuse
from fisedit_compiler.slots.base import Slot
from fisedit_compiler.slots.registry import check_kind, is_own


def verify(program: Program, after: str) -> None:
    """Check the invariants of a graph under rewriting.

    Raises:
        VerificationError: one does not hold; names pass ``after`` and the node.
    """
    try:
        program.graph.lint()
    except RuntimeError as error:
        raise VerificationError(f"After pass {after}: the graph is malformed ({error}). {remedy(after)}") from error
    origins = {node.name: node for node in program.captured.graph.nodes}
    for node in program.graph.nodes:
        if node.target is ir.pack:
            _check_pack(node, after)
        elif node.target is ir.unpack:
            _check_unpack(node, program, after)
        elif node.target is ir.load:
            _check_load(node, program, origins, after)
        elif node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            if has_spec(node) and "layout" not in node.meta and _reads_sites(node):
                raise broken(after, node, f"reads dense values with sites, but {NO_LAYOUT}")
            if "spec" not in node.meta and "expr" not in node.meta:
                raise broken(after, node, "has no spec")
            if node.target._schema.is_mutable:
                raise broken(after, node, "mutates an argument; passes must stay functional")


def verify_functional(graph: fx.Graph) -> None:
    """Check that what slot kinds made of a graph writes to nothing: neither to a recording nor to the caller's tensors.

    Raises:
        VerificationError: a node writes to its argument; names it.
    """
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            raise VerificationError(
                f"{ir.describe(node)} writes to its argument. What a slot kind's store(), load() and store_rows() make "
                "must be functional, or it changes recordings and the caller's tensors; call the operation without _."
            )


def verify_complete(program: Program) -> None:
    """No spatial operation is left dense without a recorded reason, and every slot has one spec."""
    for node in program.graph.nodes:
        layout = node.meta.get("layout")
        dense = node.op == "call_function" and node.target not in ir.MARKERS and node.meta.get("varies")
        if dense and isinstance(layout, Layout) and layout.is_rows and node.name not in program.refusals:
            raise broken("the last one", node, "is a spatial operation left dense without a recorded reason")
    specs: dict[str, ValueSpec] = {}
    for node in ir.nodes_calling(program.graph, [ir.load]):
        known = specs.setdefault(str(node.args[0]), spec_of(node))
        if known != spec_of(node):
            raise broken("the last one", node, f"loads slot {node.args[0]} as {spec_of(node)} and as {known}")


def _reads_sites(node: fx.Node) -> bool:
    """Whether a node reads a dense value with sites, as no operation on rows does."""
    layouts = (operand.meta.get("layout") for operand in node.all_input_nodes if operand.meta.get("varies"))
    return any(isinstance(layout, Layout) and layout.is_rows for layout in layouts)


def _check_pack(node: fx.Node, after: str) -> None:
    value = node.args[0]
    layout = value.meta.get("layout") if isinstance(value, fx.Node) and has_spec(value) else None
    if not isinstance(value, fx.Node) or not isinstance(layout, Layout) or not layout.is_rows:
        raise broken(after, node, "packs a value without sites")
    if value.target is ir.unpack:
        raise broken(after, node, "packs what was just unpacked; use Rewriter.rows")
    _expect(after, node, spec_of(node), _packed(value))


def _check_unpack(node: fx.Node, program: Program, after: str) -> None:
    rows, base = node.args
    if not isinstance(rows, fx.Node) or not isinstance(base, fx.Node):
        raise broken(after, node, "needs rows and a base value")
    slot = program.slots.get(str(base.args[0])) if base.target is ir.load else None
    if slot is not None and slot.kind.holds != "value":
        raise broken(after, node, f"is put over slot {slot.name}, whose kind {slot.kind.name} holds no dense values")
    _expect(after, node, spec_of(rows), _packed(node))
    _expect(after, node, spec_of(base), spec_of(node))


def _check_load(node: fx.Node, program: Program, origins: Mapping[str, fx.Node], after: str) -> None:
    slot = program.slots.get(str(node.args[0]))
    if slot is None:
        raise broken(after, node, f"loads slot {node.args[0]}, which nothing stores")
    if slot.origin not in origins:
        raise broken(after, node, f"slot {slot.name} comes from {slot.origin}, which the dense graph does not have")
    check_kind(slot.kind, slot.name)
    problem = slot.problem(spec_of(origins[slot.origin]), spec_of(node))
    if problem:
        _refuse_slot(after, node, slot, problem)
    about = [slot.name]
    while slot.of:
        if slot.of not in program.slots:
            _refuse_slot(after, node, slot, f"slot {slot.name} is stored about slot {slot.of}, which is not there")
        if slot.of in about:
            circle = ", ".join((*about, slot.of))
            _refuse_slot(after, node, slot, f"slots are stored about each other: {circle}")
        about.append(slot.of)
        slot = program.slots[slot.of]


def _refuse_slot(after: str, node: fx.Node, slot: Slot, problem: str) -> NoReturn:
    """Refuse a slot that a pass asks for and its kind cannot be: the pass's fault, unless the kind is from outside."""
    if is_own(slot.kind):
        raise broken(after, node, f"asks kind {slot.kind.name!r} for slot {slot.name}: {problem}")
    refuse(
        slot,
        f"pass {after} asks for it in {ir.describe(node)}, and {problem}",
        remedy="Let the rewrite ask for another kind, such as Canvas(), and for the slots that it is about, or return "
        "a reason, so that the operation stays dense; or mend the kind",
    )


def _packed(value: fx.Node) -> ValueSpec:
    layout: Layout = value.meta["layout"]
    return layout.row_spec(spec_of(value))


def _expect(after: str, node: fx.Node, actual: ValueSpec, expected: ValueSpec) -> None:
    if actual != expected:
        raise broken(after, node, f"has {actual} where {expected} is due")


def broken(after: str, node: fx.Node, problem: str) -> VerificationError:
    """The error for a node that a pass left as it must not be."""
    return VerificationError(f"After pass {after}: {ir.describe(node)} {problem}. {remedy(after)}")


def remedy(after: str) -> str:
    """What to do about a defect of a pass."""
    return (
        "This is a defect of the pass, not of your model; "
        f"SparsifyConfig(disabled_passes={{{after!r}}}) avoids it until it is mended."
    )
