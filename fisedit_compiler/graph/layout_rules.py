"""Layout inference: which axes of a value are spatial, read from its sympy shape.

An axis is spatial because its expression says so: ``4*h`` next to ``4*w`` is a map at level ``k/4``; ``16*h*w`` is
the flattened token axis of that level; neither symbol: not spatial. What the expression cannot know (a view that
cuts an axis into windows, a token axis merged with heads) is settled by the rules for shape-changing operations, and
what comes behind such a view by its parts (``site_parts.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from torch import fx

from fisedit_compiler.errors import LayoutError
from fisedit_compiler.graph.axis_roles import Batch, Channel, Joined, Role, Sites
from fisedit_compiler.graph.ir import describe
from fisedit_compiler.graph.layout import Layout, opaque
from fisedit_compiler.graph.registered import rule_table
from fisedit_compiler.graph.site_parts import Parts, parts_of
from fisedit_compiler.graph.sizes import BATCH, HEIGHT, WIDTH
from fisedit_compiler.graph.specs import ValueSpec, has_spec, spec_of
from fisedit_compiler.graph.views import PERMUTATIONS, RANK_CHANGES, VIEWS, Group, order_of, view_groups

MOVES = VIEWS | PERMUTATIONS | RANK_CHANGES


class LayoutRules:
    """Infers layouts for one captured graph whose spatial inputs have ``multiple*h`` by ``multiple*w`` sites."""

    def __init__(self, multiple: int) -> None:
        self.multiple = multiple
        self._cut: dict[fx.Node, tuple[Parts, ValueSpec]] = {}

    def annotate(self, graph: fx.Graph) -> None:
        """Set ``meta["layout"]`` on every tensor node (a tuple of layouts on multi-output nodes)."""
        for node in graph.nodes:
            spec = node.meta.get("spec")
            if isinstance(spec, ValueSpec):
                layout = self._refine(node, self.from_spec(spec))
                node.meta["layout"] = self._behind_cuts(node, spec, layout)
                if node.op == "call_function" and node.target in LAYOUT_RULES:
                    node.meta["layout"] = _by_rule(node)
            elif isinstance(spec, tuple):
                node.meta["layout"] = tuple(self._behind_cuts(node, item, self.from_spec(item)) for item in spec)

    def from_spec(self, spec: ValueSpec) -> Layout:
        """Layout of a value by its shape expressions alone."""
        rank, height_axes, width_axes, token_axes, sums = spec.rank, [], [], [], []
        for axis, size in enumerate(spec.shape):
            symbols = size.free_symbols & {HEIGHT, WIDTH}
            if not symbols:
                continue
            if size.is_Add:
                sums.append(axis)
            elif symbols == {HEIGHT} and (size / HEIGHT).is_Rational:
                height_axes.append(axis)
            elif symbols == {WIDTH} and (size / WIDTH).is_Rational:
                width_axes.append(axis)
            elif symbols == {HEIGHT, WIDTH} and (size / (HEIGHT * WIDTH)).is_Rational:
                token_axes.append(axis)
            elif BATCH in size.free_symbols:
                return opaque(rank, f"axis {axis} of size {size} merges the batch with sites")
            else:
                return opaque(rank, f"axis {axis} of size {size} is not a whole multiple of height or width")
        if not (height_axes or width_axes or token_axes or sums):
            return Layout(_roles(spec, {}))
        if len(sums) == 1 and not (height_axes or width_axes or token_axes):
            joined = {sums[0]: Joined(frozenset(spec.shape[sums[0]].args))}
            return Layout(_roles(spec, joined), f"axis {sums[0]} puts other tokens beside sites")
        if len(token_axes) == 1 and not (height_axes or width_axes or sums):
            return self._tokens(spec, token_axes[0])
        if len(height_axes) == len(width_axes) == 1 and not (token_axes or sums):
            return self._map(spec, height_axes[0], width_axes[0])
        return opaque(rank, f"shape {list(spec.shape)} relates sites to sites (such as an attention matrix)")

    def _map(self, spec: ValueSpec, height_axis: int, width_axis: int) -> Layout:
        height, width = (spec.shape[axis] / symbol for axis, symbol in ((height_axis, HEIGHT), (width_axis, WIDTH)))
        if height != width:
            return opaque(spec.rank, f"height is scaled by {height} but width by {width}")
        level = Fraction(self.multiple) / Fraction(int(height.p), int(height.q))
        return Layout(_roles(spec, {height_axis: Sites(level, "height"), width_axis: Sites(level, "width")}))

    def _tokens(self, spec: ValueSpec, axis: int) -> Layout:
        count = spec.shape[axis] / (HEIGHT * WIDTH)
        root = Fraction(math.isqrt(int(count.p)), math.isqrt(int(count.q)))
        if root * root != Fraction(int(count.p), int(count.q)):
            return opaque(spec.rank, f"axis {axis} has {spec.shape[axis]} entries, which is no level of the model")
        return Layout(_roles(spec, {axis: Sites(Fraction(self.multiple) / root)}))

    def _refine(self, node: fx.Node, layout: Layout) -> Layout:
        """Correct what shapes alone cannot know: views that cut or merge spatial axes."""
        if node.op != "call_function" or node.target not in VIEWS or not layout.is_rows:
            return layout
        source = node.args[0]
        if not has_spec(source) or not source.meta["layout"].is_rows:  # type: ignore[union-attr]
            return layout
        groups = view_groups(spec_of(source).shape, spec_of(node).shape)  # type: ignore[arg-type]
        if groups is None:
            return opaque(layout.rank, "a view whose axes cannot be matched with its input's")
        reason = spatial_view_problem(groups, source.meta["layout"], layout)  # type: ignore[union-attr]
        return opaque(layout.rank, reason) if reason else layout

    def _behind_cuts(self, node: fx.Node, spec: ValueSpec, layout: Layout) -> Layout:
        """Follow the sites from a view that cuts or merges them to where they are a level's again.

        Behind such a view shapes are believed only where the parts agree: an axis may be as long as a level's and hold
        other sites.
        """
        if node.target in MOVES and has_spec(node.args[0]):
            parts = self._moved(node, spec, layout)
            agrees = parts is None or not layout.is_rows or parts.are_sites_of(layout, self.multiple)
        else:
            operands = [operand for operand in node.all_input_nodes if operand in self._cut]
            scattered = [operand for operand in operands if not self._holds_sites(operand)]
            if not operands or layout.kind == "plain":
                return layout
            source = (scattered or operands)[0]
            before, shape = self._cut[source]
            parts = before.carried(shape, spec)
            agrees = not (scattered and layout.is_rows)
            if not scattered and layout.is_rows and not parts.are_sites_of(layout, self.multiple):
                parts = None  # sites that were computed anew
        if parts is not None:
            self._cut[node] = (parts, spec)
        return layout if agrees else opaque(layout.rank, f"{layout} by its shape, but its axes hold sites of elsewhere")

    def _moved(self, node: fx.Node, spec: ValueSpec, layout: Layout) -> Parts | None:
        """Parts behind a view or permutation, ``None`` where none were cut."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if source in self._cut:
            before = self._cut[source][0]
        elif source.meta["layout"].is_rows and layout.kind == "opaque":
            before = parts_of(source.meta["layout"], spec_of(source), self.multiple)
        else:
            return None
        if node.target in PERMUTATIONS:
            return before.permuted(order_of(node, spec.rank))
        return before.viewed(spec)

    def _holds_sites(self, node: fx.Node) -> bool:
        """Whether the sites of a value behind a cut are where its shape says, if that says anything."""
        parts, spec = self._cut[node]
        layout = self.from_spec(spec)
        return parts.are_sites_of(layout, self.multiple) if layout.is_rows else parts.axes is not None


def _roles(spec: ValueSpec, spatial: Mapping[int, Role]) -> tuple[Role, ...]:
    """Roles of all axes: the spatial ones as given, the others by whether the batch is in their size."""
    others = (Batch() if BATCH in size.free_symbols else Channel() for size in spec.shape)
    return tuple(spatial.get(axis, role) for axis, role in enumerate(others))


LayoutRule = Callable[[fx.Node, Layout], Layout]
LAYOUT_RULES: dict[Any, LayoutRule] = rule_table()
"""Rules for single operations, registered from outside (``extend.py``): they have the last word."""


def _by_rule(node: fx.Node) -> Layout:
    inferred: Layout = node.meta["layout"]
    rule = LAYOUT_RULES[node.target]
    name = f"{rule.__module__}.{rule.__qualname__}"
    try:
        layout = rule(node, inferred)
    except Exception as error:
        raise LayoutError(
            f"The layout rule {name} failed on {describe(node)}: {type(error).__name__}: {error}. Mend the rule."
        ) from error
    if not isinstance(layout, Layout) or layout.rank != inferred.rank:
        raise LayoutError(
            f"The layout rule {name} gave {layout!r} for {describe(node)}, whose value has {inferred.rank} axes. "
            "Return a Layout of that rank: the inferred one, or opaque(rank, reason)."
        )
    return layout


def spatial_view_problem(groups: list[Group], source: Layout, target: Layout) -> str | None:
    """Why a view between two spatial layouts is not site by site; ``None`` when it is."""
    if source.level != target.level:
        return "a view that changes the number of sites (windows, patches or pixel shuffle)"
    for left, right in groups:
        spatial_left = tuple(axis for axis in left if axis in source.axes)
        spatial_right = tuple(axis for axis in right if axis in target.axes)
        if not spatial_left and not spatial_right:
            continue
        if left != spatial_left or right != spatial_right:
            return "a view that merges sites with channels, heads or the batch"
        if len(spatial_left) == 2 and spatial_left != source.axes:
            return "a view that flattens columns before rows"
        if len(spatial_right) == 2 and spatial_right != target.axes:
            return "a view that unflattens columns before rows"
    return None
