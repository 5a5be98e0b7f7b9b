"""The pinned program: what a sparse edit must compute, by running the dense graph and overwriting inactive sites.

The captured graph runs for the base inputs and for the edit's side by side, node by node. After every node, the
inactive sites of the edit's value are overwritten by the base run's. Nothing of the passes' output takes part, except
which operations were left dense and which upsamplings a convolution swallowed: both move a boundary. Comparing with
the packed program is ``check.py``'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from fisedit_compiler.geometry.site_plan import SitePlan
from fisedit_compiler.graph.inputs import key_of, loaded_slot
from fisedit_compiler.graph.layout import Layout
from fisedit_compiler.lowering.program import CompiledProgram
from fisedit_compiler.slots.base import Slot
from fisedit_compiler.slots.statistics import statistics_of

aten = torch.ops.aten


@dataclass(frozen=True)
class PinnedValue:
    """What one node of the dense graph gives.

    Attributes:
        base: for the base inputs.
        pinned: for the edit, with inactive sites from ``base``: what operations on rows go on with.
        dense: for the edit, what operations that stay dense go on with: the value as it is after one of their own,
            the pinned one after an operation on rows.
        upsampled: on an upsampling that a convolution swallows, its result on the pinned coarse map.
    """

    base: Any
    pinned: Any
    dense: Any
    upsampled: Any = None


Observer = Callable[[fx.Node, PinnedValue], None]


class PinnedInterpreter(fx.Interpreter):
    """Runs a program's captured graph for two sets of inputs, the second pinned to the first.

    ``run`` takes one :class:`PinnedValue` per placeholder (only ``base`` and ``dense`` are read) and returns one per
    output. Values are freed after their last use; ``observe`` sees each when it is made.
    """

    def __init__(self, program: CompiledProgram, module: nn.Module, plan: SitePlan, observe: Observer) -> None:
        super().__init__(module, graph=program.captured.graph)
        self.extra_traceback = False
        self.program, self.plan, self.observe = program, plan, observe
        self._refused = {name for name, *_ in program.refusals}
        swallowing = swallowing_convolutions(program)
        self._swallowing = swallowing
        self._swallowed = {node.args[0]: node.name for node in self.graph.nodes if node.name in swallowing}
        self._rounded = rounded_operands(program)

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.op == "output":
            return args[0]
        if n.op == "get_attr":
            value = attribute(self.program, self.module, str(n.target))
            made = PinnedValue(value, value, value)
        elif n.op == "placeholder":
            given = next(self.args_iter)
            made = PinnedValue(given.base, self._pin(n, given.dense, given.base), given.dense)
        else:
            made = self._call(n, args, kwargs)
        self.observe(n, made)
        return made

    def _call(self, node: fx.Node, args: Any, kwargs: Any) -> PinnedValue:
        function: Any = node.target
        base = function(*_each(args, "base"), **_each(kwargs, "base"))
        raw = self._edit(node, *self._as_read(node, node.name, args, kwargs))
        pinned = self._pin(node, raw, base)
        upsampled = None
        if node in self._swallowed:
            read, named = self._as_read(node, self._swallowed[node], args, kwargs)
            upsampled = function(*_each(read, "pinned"), **_each(named, "pinned"))
        return PinnedValue(base, pinned, raw if self._stays_dense(node) else pinned, upsampled)

    def _as_read(self, node: fx.Node, reader: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """A node's operands with inactive sites as ``reader`` gets them back from a recording that rounds."""
        rounded = self._rounded.get(reader)
        if rounded is None:
            return args, kwargs

        def operand(source: fx.Node) -> Any:
            value, slot = self.env[source], rounded.get(source.name)
            if slot is None:
                return value
            return replace(value, pinned=self._pin(source, value.pinned, slot.pinned(value.base)))

        return fx.map_arg(node.args, operand), fx.map_arg(node.kwargs, operand)

    def _edit(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """The edit's value by the rules of the rewritten operations."""
        function: Any = node.target
        if self._stays_dense(node):
            return function(*_each(args, "dense"), **_each(kwargs, "dense"))
        arguments, named = list(_each(args, "pinned")), dict(_each(kwargs, "pinned"))
        if node.name in self._swallowing:
            arguments[0] = args[0].upsampled
        elif function is aten.group_norm.default and self.program.config.norm == "recorded" and _has_sites(node):
            return _normalise(arguments, args[0].base)
        elif function is aten.scaled_dot_product_attention.default and self.program.config.attention == "active":
            self._keep_active(node, arguments)
        return function(*arguments, **named)

    def _stays_dense(self, node: fx.Node) -> bool:
        return node.name in self._refused or not node.meta.get("varies")

    def _keep_active(self, node: fx.Node, arguments: list[Any]) -> None:
        """Leave inactive keys and values out of self-attention; those of a text all stay."""
        for position in (1, 2):
            operand = node.args[position]
            assert isinstance(operand, fx.Node)
            layout: Layout = operand.meta["layout"]
            if layout.is_rows:
                assert layout.level is not None
                active = self.plan.active[layout.level]
                arguments[position] = arguments[position].index_select(layout.axes[0], active)

    def _pin(self, node: fx.Node, raw: Any, base: Any) -> Any:
        return pin(raw, base, node.meta.get("layout"), self.plan)


def attribute(program: CompiledProgram, module: nn.Module, name: str) -> Any:
    """What a ``get_attr`` node stands for now: a constant of the graph, or a tensor of the user's module."""
    constant = program.constants.get(name)
    return constant if constant is not None else attrgetter(name)(module)


def swallowing_convolutions(program: CompiledProgram) -> set[str]:
    """Origins of the sparse convolutions that read a coarse map through an upsampling in front of them."""
    found = set()
    for node in program.step.nodes:
        if node.target is torch.ops.fisedit.conv2d_sites.default and key_of(node.args[3]).upsample > 1:
            found.update(node.meta.get("stands_for", ())[:1])
    return found


def rounded_operands(program: CompiledProgram) -> dict[str, dict[str, Slot]]:
    """For every captured node that reads slots which round: these, by the captured node whose values they are."""
    slots = {slot.name: slot for slot in program.slots if slot.kind.rounding}
    found: dict[str, dict[str, Slot]] = {}
    for node in program.step.nodes if slots else ():
        for operand in node.all_input_nodes:
            slot = slots.get(loaded_slot(operand))
            if slot is not None and "origin" in node.meta:
                found.setdefault(node.meta["origin"], {})[slot.origin] = slot
    return found


def pin(raw: Any, base: Any, layout: Any, plan: SitePlan) -> Any:
    """``raw`` with inactive sites from ``base``; values without sites, or whose sites are mixed, as they are."""
    if isinstance(raw, (list, tuple)) and isinstance(layout, tuple):
        return type(raw)(pin(*parts, plan) for parts in zip(raw, base, layout, strict=True))
    if not isinstance(raw, Tensor) or not isinstance(layout, Layout) or not layout.is_rows:
        return raw
    return torch.where(plan.selector(layout), raw, base)


def _each(structure: Any, which: str) -> Any:
    def choose(leaf: Any) -> Any:
        return getattr(leaf, which) if isinstance(leaf, PinnedValue) else leaf

    return fx.node.map_aggregate(structure, choose)


def _has_sites(node: fx.Node) -> bool:
    layout = node.meta.get("layout")
    return isinstance(layout, Layout) and layout.is_rows


def _normalise(arguments: list[Any], base: Tensor) -> Tensor:
    """GroupNorm of the edit's value by the base value's statistics."""
    x, groups, weight, bias, eps = [*arguments, None, None, 1e-5][: max(len(arguments), 5)][:5]
    mean, variance = statistics_of(base, groups).unbind(dim=-1)
    grouped = x.float().reshape(x.shape[0], groups, -1)
    normal = ((grouped - mean[:, :, None]) * torch.rsqrt(variance[:, :, None] + eps)).reshape(x.shape)
    per_channel = (1, -1) + (1,) * (x.dim() - 2)
    if weight is not None:
        normal = normal * weight.float().reshape(per_channel)
    if bias is not None:
        normal = normal + bias.float().reshape(per_channel)
    return normal.to(x.dtype)


def inputs_of(program: CompiledProgram, base: Mapping[str, Tensor], edited: Mapping[str, Tensor]) -> list[PinnedValue]:
    """What :meth:`PinnedInterpreter.run` takes, from two calls' tensors by placeholder name."""
    names = [spec.identifier() for spec in program.signature.tensors]
    return [PinnedValue(base[name], None, edited[name]) for name in names]
