"""What every pass is made of: the working program, its slots, and the three moves of rewriting.

A pass takes a dense node apart with three moves: ask for the *rows* of its spatial inputs, compute on rows, and
*replace* the dense node by the result. ``replace`` leaves a dense value (``unpack``) behind only for readers that are
still dense; when such a reader is rewritten later, ``pack(unpack(rows, base))`` cancels to ``rows`` on the spot. So
passes may run in any order, any of them may be left out, and an operation nobody rewrote is a dense island between
a scatter and a gather by construction.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import fx

from fisedit_compiler.capture.captured import CapturedGraph
from fisedit_compiler.config import SparsifyConfig
from fisedit_compiler.errors import FiseditError, VerificationError
from fisedit_compiler.graph import ir
from fisedit_compiler.graph.layout import Layout
from fisedit_compiler.graph.site_order import is_identity
from fisedit_compiler.graph.sizes import HEIGHT, WIDTH, SizeBuilder, row_symbol
from fisedit_compiler.graph.specs import ValueSpec, has_spec, spec_of
from fisedit_compiler.slots.base import Slot, SlotKind
from fisedit_compiler.slots.canvas import Canvas
from fisedit_compiler.slots.dense import Dense
from fisedit_compiler.slots.registry import check_kind

NO_LAYOUT = 'it has no layout: set node.meta["layout"], or write it by Rewriter.exchange'
"""What is wrong with a dense value that a pass made and said nothing of its sites, and the remedy."""
EVERY_OTHER = "*"
"""In ``after`` or ``before`` of a pass of the package: all others of the package."""


@dataclass
class Program:
    """A program under rewriting: the dense graph as captured, and the graph passes work on.

    Attributes:
        captured: the dense graph, left as captured and simplified; the recording graph is made from it.
        graph: the working graph.
        slots: recorded values asked for so far, by name.
        loaded: what readers get of each slot, by name (filled when the graph is lowered).
        refusals: why an operation stays dense, by node name (filled at the end for whatever is left).
    """

    captured: CapturedGraph
    graph: fx.Graph
    config: SparsifyConfig
    slots: dict[str, Slot] = field(default_factory=dict)
    loaded: dict[str, ValueSpec] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)

    @property
    def multiple(self) -> int:
        return self.captured.multiple

    def spatial_inputs(self) -> list[fx.Node]:
        """Placeholders of the spatial inputs, the one that sets height and width first."""
        nodes = {node.name: node for node in self.graph.nodes if node.op == "placeholder"}
        return [nodes[name] for name in self.captured.signature.spatial_names]


class GraphPass(ABC):
    """A pass that goes through the graph as it likes. ``name`` is what users disable.

    ``after`` and ``before`` name the passes that it comes after and before (``passes/order.py``).
    """

    name: ClassVar[str]
    after: ClassVar[tuple[str, ...]] = ()
    before: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def run(self, program: Program) -> None:
        """Rewrite ``program.graph`` in place."""


class Pass(GraphPass):
    """A rewrite of one node at a time. ``targets`` are the operations it looks for."""

    targets: ClassVar[frozenset[Any]] = frozenset()

    @classmethod
    def looks_for(cls, target: Any) -> bool:
        """Whether calls of an operation are this pass's business."""
        return target in cls.targets

    def run(self, program: Program) -> None:
        rewriter = Rewriter(program)
        for node in list(program.graph.nodes):
            if node.op == "call_function" and self.looks_for(node.target) and self.wants(node):
                reason = self._rewritten(node, rewriter)
                if reason:
                    known = [node.meta["refused"]] if "refused" in node.meta else []
                    node.meta["refused"] = "; ".join([*known, f"{self.name}: {reason}"])
        program.graph.eliminate_dead_code()

    def _rewritten(self, node: fx.Node, rewriter: Rewriter) -> str | None:
        """What :meth:`rewrite` returned; an error of another package gets a name and a place."""
        cause: Exception | None = None
        try:
            reason: Any = self.rewrite(node, rewriter)
            if reason is None or isinstance(reason, str):
                return reason
            problem = f"returned {reason!r}, and returns None, or why the node stays dense, in words"
        except FiseditError:
            raise
        except Exception as error:
            problem, cause = f"raised {type(error).__name__}: {error}", error
        raise VerificationError(
            f"Pass {self.name} ({type(self).__module__}.{type(self).__qualname__}) at {ir.describe(node)} {problem}. "
            f"Mend the pass, or leave it out with SparsifyConfig(disabled_passes={{{self.name!r}}})."
        ) from cause

    def wants(self, node: fx.Node) -> bool:
        """Whether this call of such an operation is: its output is spatial and varies."""
        layout = node.meta.get("layout")
        return isinstance(layout, Layout) and layout.is_rows and bool(node.meta.get("varies"))

    @abstractmethod
    def rewrite(self, node: fx.Node, rewriter: Rewriter) -> str | None:
        """Rewrite one node, or return why it stays dense, in words a user can act on.

        ``None`` also leaves a node alone that is not this pass's business. The reasons of all passes are shown.
        """


class Rewriter:
    """The moves of rewriting on one program."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = program.graph
        self._sizes: SizeBuilder | None = None

    def sizes(self) -> SizeBuilder:
        """Sizes as graph nodes (made on demand)."""
        if self._sizes is None:
            self._sizes = SizeBuilder(self.graph, self.program.spatial_inputs()[0], self.program.multiple)
        return self._sizes

    # -- asking for rows -------------------------------------------------------------------------

    def rows(self, value: fx.Node) -> fx.Node:
        """Rows of the active sites of a dense spatial value."""
        layout = layout_of(value)
        assert layout.is_rows and layout.level is not None, ir.describe(value)
        if value.target is ir.unpack:
            return value.args[0]  # type: ignore[return-value]
        for user in value.users:
            if user.target is ir.pack:
                return user
        with self.graph.inserting_after(_last_placeholder(value)):
            node = ir.call(self.graph, ir.pack, (value,), spec=layout.row_spec(spec_of(value)), source=value)
        node.meta["varies"] = True
        return node

    def load(self, slot: Slot, spec: ValueSpec, before: fx.Node) -> fx.Node:
        """A recorded value; the slot's name is made unique by its origin, and equal requests share a slot."""
        check_kind(slot.kind, slot.name)
        identity = (slot.origin, slot.kind, slot.of)
        known = next((s for s in self.program.slots.values() if (s.origin, s.kind, s.of) == identity), None)
        if known is None:
            known = self._unique(slot)
            self.program.slots[known.name] = known
        for node in self.graph.nodes:
            if node is before:
                break
            if node.target is ir.load and node.args[0] == known.name:
                return node
        with self.graph.inserting_before(before):
            node = ir.call(self.graph, ir.load, (known.name,), spec=spec)
        node.meta["varies"] = True
        return node

    def canvas(self, value: fx.Node, name: str, before: fx.Node, kind: SlotKind | None = None, of: str = "") -> fx.Node:
        """The recorded canvas (packed form of all sites) of a dense value.

        Args:
            value: the dense value.
            name: of its slot, such as ``slot_name(node, "input")``.
            before: node that the loaded value is put in front of.
            kind: another form that the canvas is recorded in, whose readers get a canvas.
            of: name of the slot that such a canvas is only right together with.
        """
        layout = layout_of(value)
        assert layout.level is not None
        slot = self.slot(name, value, kind or Canvas(), of)
        return self.load(slot, layout.packed.spec(spec_of(value), self.site_count(layout.level)), before)

    def table(self, kind: str, key: Any, spec: ValueSpec, before: fx.Node) -> fx.Node:
        """An index table of the site plan; one node per table and program."""
        for node in self.graph.nodes:
            if node is before:
                break
            if node.target is ir.site_table and node.args == (kind, key):
                return node
        with self.graph.inserting_before(before):
            node = ir.call(self.graph, ir.site_table, (kind, key), spec=spec)
        node.meta["varies"] = True
        return node

    def active(self, level: Fraction, before: fx.Node) -> fx.Node:
        """Indices of the active sites of a level."""
        return self.table("active", level, ValueSpec((row_symbol(level),), torch.int64), before)

    def inverse(self, level: Fraction, before: fx.Node) -> fx.Node:
        """Row of every active site of a level, -1 elsewhere."""
        return self.table("inverse", level, ValueSpec((self.site_count(level),), torch.int32), before)

    def site_count(self, level: Fraction) -> Any:
        """``S``, the number of sites of a level, as an expression."""
        scale = Fraction(self.program.multiple) / level
        return HEIGHT * WIDTH * scale.numerator**2 / scale.denominator**2

    # -- writing rows ----------------------------------------------------------------------------

    def call(
        self, target: Any, args: Sequence[Any], spec: ValueSpec | tuple[ValueSpec, ...], source: fx.Node
    ) -> fx.Node:
        """A call on rows, right before ``source`` in the graph."""
        with self.graph.inserting_before(source):
            node = ir.call(self.graph, target, args, spec=spec, source=source)
        node.meta["varies"] = source.meta.get("varies", False)
        return node

    def exchange(self, node: fx.Node, target: Any, args: Sequence[Any]) -> fx.Node:
        """Another call in the place of one that computes the same, dense or on rows; it takes over its facts.

        After the pass, the verifier calls it once with example sizes: it must give the shape and dtype of ``node``.

        Raises:
            VerificationError: ``node`` is no call of this graph with one value.
        """
        if not isinstance(node, fx.Node) or node.graph is not self.graph or node._erased:
            raise VerificationError(f"Rewriter.exchange got {node!r}, which is no node of the program's graph.")
        if node.op != "call_function" or not has_spec(node):
            raise VerificationError(
                f"Rewriter.exchange got {ir.describe(node)}, whose kind is {node.op} or which has several values; "
                "it exchanges calls with one value."
            )
        with self.graph.inserting_before(node):
            other = ir.call(self.graph, target, args, spec=spec_of(node), source=node)
        other.meta = dict(node.meta)
        node.replace_all_uses_with(other)
        self.graph.erase_node(node)
        return other

    def permuted(self, value: fx.Node, order: Sequence[int], source: fx.Node) -> fx.Node:
        """``value`` with its axes in another order; nothing is written for the identity."""
        if is_identity(order):
            return value
        spec = spec_of(value)
        permuted = ValueSpec(tuple(spec.shape[axis] for axis in order), spec.dtype)
        return self.call(torch.ops.aten.permute.default, (value, list(order)), permuted, source)

    def constant(self, target: Any, args: Sequence[Any], spec: ValueSpec, source: fx.Node) -> fx.Node:
        """A call that depends on weights or other non-spatial values only; it will be hoisted."""
        node = self.call(target, args, spec, source)
        node.meta["varies"] = any(a.meta.get("varies", False) for a in node.all_input_nodes)
        return node

    def row_spec(self, node: fx.Node) -> ValueSpec:
        """Spec of the rows of a dense node."""
        layout = layout_of(node)
        return layout.row_spec(spec_of(node))

    def replace(self, node: fx.Node, rows: fx.Node) -> None:
        """Let ``rows`` stand for the dense ``node``; dense readers, if any, get an ``unpack``."""
        ir.stand_for(rows, node)
        for user in list(node.users):
            if user.target is ir.pack:
                ir.stand_for(rows, user)
                user.replace_all_uses_with(rows)
                self.graph.erase_node(user)
        if node.users:
            slot = self.slot(slot_name(node, "output"), node, Dense())
            base = self.load(slot, spec_of(node), node)
            dense = self.call(ir.unpack, (rows, base), spec_of(node), node)
            dense.meta["layout"] = node.meta["layout"]
            node.replace_all_uses_with(dense)
        self.graph.erase_node(node)

    def _unique(self, slot: Slot) -> Slot:
        """A slot whose natural name is taken by another value gets its producer's name as suffix."""
        if slot.name not in self.program.slots:
            return slot
        name, number = f"{slot.name}.{slot.origin}", 2
        while name in self.program.slots:  # a third form of one value, and further ones
            name, number = f"{slot.name}.{slot.origin}.{number}", number + 1
        return replace(slot, name=name)

    def slot(self, name: str, value: fx.Node, kind: SlotKind, of: str = "") -> Slot:
        """A slot for a dense value; ``of`` names the slot that it is stored about, if its kind needs one."""
        return Slot(name, value.meta["origin"], kind, layout_of(value), of)


def layout_of(value: fx.Node) -> Layout:
    """The layout of a dense value.

    Raises:
        VerificationError: whoever made it gave it none.
    """
    layout = value.meta.get("layout")
    if not isinstance(layout, Layout):
        raise VerificationError(f"{ir.describe(value)} is read as a dense value, but {NO_LAYOUT}.")
    return layout


def slot_name(node: fx.Node, what: str) -> str:
    """Natural name of a slot: the module path of the operation that asks for it, and what it is to it."""
    path = ir.path_of(node)
    return f"{path}.{what}" if path else what


def _last_placeholder(node: fx.Node) -> fx.Node:
    """``node``, or the last of the placeholders and attributes behind it, so that inputs stay first."""
    while node.next.op in ("placeholder", "get_attr"):
        node = node.next
    return node
