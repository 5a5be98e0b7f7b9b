"""Judging values of the packed program against the pinned one, node by node, and naming what differs.

A value that differs is noted and *replaced by the right one* before the program goes on, so every node is judged on
right inputs: what is noted are faults, not their echoes, and no error adds up over the depth of the network. What
is right says ``pinned.py``; which inputs a check uses, and its report, are in ``check.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from fisedit_compiler.geometry.site_plan import SitePlan
from fisedit_compiler.graph import ir
from fisedit_compiler.graph.inputs import Input, graph_inputs
from fisedit_compiler.graph.layout import Layout
from fisedit_compiler.inspect.pinned import PinnedValue, attribute, pin
from fisedit_compiler.kernels.tolerances import TOLERANCES
from fisedit_compiler.lowering.program import CompiledProgram
from fisedit_compiler.slots.base import Slot

SITES_SHOWN = 4


@dataclass(frozen=True)
class Difference:
    """One value of the packed program that is not the pinned one's.

    Attributes:
        node: name of the node in the captured graph; of a recorded or hoisted value, the first node that reads it.
        operation: what the node computes, such as ``aten.conv2d``.
        path: module in the user's model.
        source: source line in the user's model, where the capture knows it.
        what: which value of the node: ``rows``, ``dense value``, ``output 0``, ``slot ...``, ``hoisted ...``.
        error: largest absolute difference; infinite where values cannot be compared.
        allowed: largest absolute difference within tolerance.
        sites: which sites differ, as a sentence; empty where the value has none.
        problem: why values cannot be compared, if they cannot.
    """

    node: str
    operation: str
    path: str
    source: str
    what: str
    error: float
    allowed: float
    sites: str = ""
    problem: str = ""

    def __str__(self) -> str:
        place = self.path or "the top module"
        text = f"{self.node} = {self.operation} in {place}" + (f" ({self.source})" if self.source else "")
        found = self.problem or f"largest error {self.error:.2e}, allowed {self.allowed:.2e}"
        return f"{text}: {self.what}: {found}" + (f", {self.sites}" if self.sites else "")


class Expectations:
    """What the pinned program says of every value that will be judged; fed node by node, keeps only what is asked for.

    Attributes:
        rows: rows of the active sites, by captured node.
        dense: values of operations that stay dense, by captured node.
        pinned: whole dense values with inactive sites from the base run, by captured node.
        slots: what a recording of the base inputs must hold.
        edited_slots: what a recording of the edit must hold.
    """

    def __init__(self, program: CompiledProgram, plan: SitePlan) -> None:
        self.plan = plan
        self.rows: dict[str, Tensor] = {}
        self.dense: dict[str, Any] = {}
        self.pinned: dict[str, Tensor] = {}
        self.slots: dict[str, Tensor] = {}
        self.edited_slots: dict[str, Tensor] = {}
        self._slots: dict[str, list[Slot]] = {}
        for slot in program.slots:
            self._slots.setdefault(slot.origin, []).append(slot)
        lowered = [node for graph in (program.step, *(b.graph for b in program.bundles)) for node in graph.nodes]
        self._rows = {origin for node in lowered for origin in node.meta.get("stands_for", ())}
        self._dense = {node.meta["origin"] for node in lowered if is_dense(node)}
        self._pinned = {slot.origin for slot in program.slots if slot.kind.holds == "value"}

    def observe(self, node: fx.Node, value: PinnedValue) -> None:
        """Keep what is asked for of one node of the captured graph."""
        if node.name in self._rows:
            layout: Layout = node.meta["layout"]
            assert layout.level is not None
            self.rows[node.name] = layout.packed.gather(value.pinned, self.plan.active[layout.level])
        if node.name in self._dense:
            self.dense[node.name] = value.dense
        if node.name in self._pinned:
            self.pinned[node.name] = value.pinned
        for slot in self._slots.get(node.name, ()):
            self.slots[slot.name] = slot.recorded(value.base)
            self.edited_slots[slot.name] = slot.edited(value.base, value.pinned)


def is_dense(node: fx.Node) -> bool:
    """Whether a node of a lowered graph is one of the captured graph, as it was."""
    return node.op == "call_function" and "layout" in node.meta and "origin" in node.meta


class Judge:
    """Compares values and keeps what differs.

    Attributes:
        differences: what differs, in the order it was found.
        compared: number of values compared.
    """

    def __init__(self, program: CompiledProgram, plan: SitePlan, tolerance: float | None) -> None:
        """``tolerance``: relative to a value's largest element; ``None`` for that of its precision."""
        self.plan, self.tolerance = plan, tolerance
        self.differences: list[Difference] = []
        self.compared = 0
        self._nodes = {node.name: node for node in program.captured.graph.nodes}

    def close(
        self,
        origin: str,
        what: str,
        actual: Any,
        expected: Any,
        layout: Layout | None = None,
        rows: bool = False,
        rounding: float = 0.0,
    ) -> bool:
        """Whether two values agree; notes it if they do not.

        Args:
            origin: captured node that the value belongs to.
            what: which value of it.
            actual: the packed program's.
            expected: the pinned program's.
            layout: where the sites of the dense value are, if it has any.
            rows: whether the values are in packed form.
            rounding: relative error, of the largest element, that is no fault.
        """
        self.compared += 1
        if not isinstance(actual, Tensor) or actual.shape != expected.shape or actual.dtype != expected.dtype:
            self.note(origin, what, problem=f"it is {_form(actual)} where {_form(expected)} is due")
            return False
        if not expected.numel():
            return True
        error, allowed = self.measure(actual, expected, rounding)
        if error <= allowed:
            return True
        difference = (actual.double() - expected.double()).abs()
        self.note(origin, what, error=error, allowed=allowed, sites=self._sites(~(difference <= allowed), layout, rows))
        return False

    def measure(self, actual: Tensor, expected: Tensor, rounding: float = 0.0) -> tuple[float, float]:
        """The largest absolute difference of two values of one shape (infinite for NaN), and what is allowed."""
        if not expected.numel():
            return 0.0, 0.0
        right = expected.double()
        relative, absolute = TOLERANCES.get(expected.dtype, (0.0, 0.0))
        relative = max(relative if self.tolerance is None else self.tolerance, rounding)
        error = float((actual.double() - right).abs().max())
        return math.inf if math.isnan(error) else error, absolute + relative * float(right.abs().max())

    def close_slot(
        self,
        origin: str,
        what: str,
        slot: Slot,
        actual: Mapping[str, Tensor],
        expected: Mapping[str, Tensor],
    ) -> bool:
        """Whether readers of a slot get the same of what is stored; notes it if they do not.

        Args:
            origin: captured node that reads the slot.
            what: which value of it.
            slot: the slot.
            actual: what is stored of all slots.
            expected: what must be.
        """
        found, right = actual.get(slot.name), expected[slot.name]
        if isinstance(found, Tensor) and (found.shape, found.dtype) == (right.shape, right.dtype):
            found = slot.read(found, {**expected, **actual})
            right = slot.read(right, expected)
        layout = slot.layout if slot.kind.holds == "value" else None
        return self.close(origin, what, found, right, layout, rounding=slot.kind.rounding)

    def same(self, origin: str, what: str, actual: Tensor, expected: Tensor, layout: Layout) -> bool:
        """Whether two dense values agree bit for bit."""
        self.compared += 1
        wrong = actual != expected
        if not bool(wrong.any()):
            return True
        error = float((actual.double() - expected.double()).abs().max())
        self.note(origin, what, error=error, allowed=0.0, sites=self._sites(wrong, layout, False))
        return False

    def note(
        self,
        origin: str,
        what: str,
        *,
        error: float = math.inf,
        allowed: float = 0.0,
        sites: str = "",
        problem: str = "",
    ) -> None:
        """Note a difference of a captured node."""
        node = self._nodes.get(origin)
        if node is None:
            self.differences.append(Difference(origin, "", "", "", what, error, allowed, sites, problem))
            return
        source, operation = str(node.meta.get("source") or ""), ir.target_name(node.target)
        self.differences.append(
            Difference(origin, operation, ir.path_of(node), source, what, error, allowed, sites, problem)
        )

    def layout_of(self, origin: str) -> Any:
        """Layout of a captured node's value (a tuple of them for several)."""
        return self._nodes[origin].meta.get("layout")

    def sorted(self) -> tuple[Difference, ...]:
        """Differences in the order of the captured graph; of one node, in the order they were found."""
        order = {name: position for position, name in enumerate(self._nodes)}
        return tuple(sorted(self.differences, key=lambda item: order.get(item.node, len(order))))

    def _sites(self, wrong: Tensor, layout: Layout | None, rows: bool) -> str:
        if layout is None or not layout.is_rows or layout.level is None:
            return ""
        by_site = wrong if rows else layout.packed.from_dense(wrong)
        others = [axis for axis in range(by_site.dim()) if axis != layout.site_dim()]
        found = (by_site.any(dim=others) if others else by_site).nonzero().flatten()
        sites = self.plan.active[layout.level][found] if rows else found
        width = self.plan.size(layout.level)[1]
        shown = [f"({int(site) // width}, {int(site) % width})" for site in sites[:SITES_SHOWN]]
        more = ", ..." if len(sites) > SITES_SHOWN else ""
        kind = "active sites" if rows else "sites"
        total = by_site.shape[layout.site_dim()]
        return f"at {len(sites)} of {total} {kind} of level {layout.level}: {', '.join(shown)}{more}"


class JudgedInterpreter(fx.Interpreter):
    """Runs a lowered graph, the step or a bundle, on the user's tensors as they are now, judging every value it can."""

    def __init__(
        self, graph: fx.Graph, program: CompiledProgram, module: nn.Module, judge: Judge, expected: Expectations
    ) -> None:
        super().__init__(module, graph=graph)
        self.extra_traceback = False
        self.program, self.judge, self.expected = program, judge, expected
        self._origins = {slot.name: slot.origin for slot in program.slots}

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return attribute(self.program, self.module, str(target))

    def run_node(self, n: fx.Node) -> Any:
        try:
            result = super().run_node(n)
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            self.judge.note(origin_of(n), "call", problem=f"{type(error).__name__}: {lines[0]}")
            raise Stopped from error
        if n.op != "call_function":
            return result
        if "updates" in n.meta:
            return self._judge_unpacked(n, result)
        if is_dense(n):
            return self._judge_dense(n, result)
        right = result
        for origin in n.meta.get("stands_for", ()):
            expected = self.expected.rows[origin]
            if not self.judge.close(origin, "rows", result, expected, self.judge.layout_of(origin), rows=True):
                right = expected
        return right

    def _judge_unpacked(self, node: fx.Node, result: Tensor) -> Tensor:
        """A dense value made of rows and recorded values: right inside the mask, the recorded one outside."""
        slot = str(node.meta["updates"])
        origin = self._origins[slot]
        layout, expected = self.judge.layout_of(origin), self.expected.pinned[origin]
        if not self.judge.close(origin, "dense value", result, expected, layout):
            return expected
        recorded = self.expected.slots[slot]
        outside = pin(recorded, result, layout, self.expected.plan)
        return result if self.judge.same(origin, "outside the mask", outside, recorded, layout) else expected

    def _judge_dense(self, node: fx.Node, result: Any) -> Any:
        origin = str(node.meta["origin"])
        expected, layouts = self.expected.dense[origin], node.meta["layout"]
        if isinstance(result, Tensor):
            same = self.judge.close(origin, "dense value", result, expected, layouts)
        else:
            parts = zip(result, expected, layouts, strict=True)
            same = all([self.judge.close(origin, f"dense value {i}", *part) for i, part in enumerate(parts)])
        return result if same else expected


def _form(value: Any) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}" if isinstance(value, Tensor) else "missing"


class Stopped(Exception):
    """The packed program raised; the judge has noted where."""


def origin_of(node: fx.Node) -> str:
    """The captured node that a node of a lowered graph works for: its own, or that of the first one that reads it."""
    names = [item.meta["origin"] for item in (node, *node.users) if "origin" in item.meta]
    return str(names[0]) if names else node.name


def origins_of_inputs(graph: fx.Graph) -> Mapping[Input, str]:
    """For every input of a step graph, the captured node that reads it first."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    first = (next((origin_of(user) for user in node.users), node.name) for node in inputs)
    return dict(zip(graph_inputs(graph), first, strict=True))
