"""Kinds of slots as another package brings them, and a small program whose canvases are of such a kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor, fx, nn

from fisedit_compiler import SparseModule, SparsifyConfig, sparsify
from fisedit_compiler.errors import FiseditError
from fisedit_compiler.extend import (
    Canvas,
    Channel,
    LoadedNode,
    Rewriter,
    Slot,
    SlotKind,
    SlotNode,
    ValueSpec,
    register_slot_kind,
)
from fisedit_compiler.graph.site_order import SITES

CANVAS = Rewriter.canvas
aten = torch.ops.aten
EIGHT_BITS = torch.float8_e4m3fn
LARGEST = torch.finfo(EIGHT_BITS).max
SCALE_BYTES = 4
ROUNDING = 2**-4
"""Of float8 with three bits behind the point."""


def scaled(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in eight bits, and by what to multiply them, one number a row."""
    scale = (rows.abs().amax(-1, keepdim=True).float() / LARGEST).clamp(min=1e-12)
    return (rows.float() / scale).to(EIGHT_BITS), scale


class EightBits(Canvas):
    """A canvas of bytes ``[B, S, C + 4]``: float8 values of a token, then the float32 that they are multiples of."""

    name: ClassVar[str] = "tests.eight_bits"
    holds: ClassVar[Literal["value", "packed", "else"]] = "else"
    rounding: ClassVar[float] = ROUNDING

    def store(self, graph: fx.Graph, slot: Slot, value: fx.Node, other: SlotNode) -> fx.Node:
        return self.store_rows(graph, slot, super().store(graph, slot, value, other), other)

    def store_rows(self, graph: fx.Graph, slot: Slot, rows: fx.Node, other: SlotNode) -> fx.Node:
        def call(target: Callable[..., object], *args: object) -> fx.Node:
            return graph.call_function(target, args)  # type: ignore[arg-type]

        largest = call(aten.amax.default, call(aten.abs.default, rows), [-1], True)
        scale = call(aten.div.Tensor, call(aten.to.dtype, largest, torch.float32), LARGEST)
        scale = call(aten.clamp.default, scale, 1e-12)
        values = call(aten.to.dtype, call(aten.div.Tensor, call(aten.to.dtype, rows, torch.float32), scale), EIGHT_BITS)
        return call(aten.cat.default, [call(aten.view.dtype, part, torch.uint8) for part in (values, scale)], -1)

    def stored_spec(self, slot: Slot, loaded: ValueSpec) -> ValueSpec:
        return ValueSpec((*loaded.shape[:-1], loaded.shape[-1] + SCALE_BYTES), torch.uint8)

    def load(self, graph: fx.Graph, slot: Slot, stored: fx.Node, loaded: ValueSpec, other: LoadedNode) -> fx.Node:
        def part(start: int, stop: int, dtype: torch.dtype) -> fx.Node:
            cut = graph.call_function(aten.slice.Tensor, (stored, -1, start, stop))
            own = graph.call_function(aten.clone.default, (cut,), {"memory_format": torch.contiguous_format})
            return graph.call_function(aten.view.dtype, (own, dtype))

        channels = int(loaded.shape[-1])
        values = graph.call_function(aten.to.dtype, (part(0, channels, EIGHT_BITS), torch.float32))
        scale = part(channels, channels + SCALE_BYTES, torch.float32)
        return graph.call_function(aten.to.dtype, (graph.call_function(aten.mul.Tensor, (values, scale)), loaded.dtype))

    def problem(self, slot: Slot, value: ValueSpec, loaded: ValueSpec) -> str:
        last = slot.layout.packed.axes[-1]
        if last == SITES or not isinstance(slot.layout.roles[last], Channel) or not loaded.shape[-1].is_Integer:
            return f"stores a scale a token, and {slot.layout} does not end with channels of a fixed number"
        return super().problem(slot, value, loaded)

    def recorded(self, slot: Slot, value: Tensor) -> Tensor:
        values, scale = scaled(super().recorded(slot, value))
        return torch.cat([values.view(torch.uint8), scale.contiguous().view(torch.uint8)], -1)

    def read(self, slot: Slot, stored: Tensor, slots: Mapping[str, Tensor]) -> Tensor:
        values = stored[..., :-SCALE_BYTES].contiguous().view(EIGHT_BITS)
        return values.float() * stored[..., -SCALE_BYTES:].contiguous().view(torch.float32)

    def pinned(self, slot: Slot, value: Tensor) -> Tensor:
        order = slot.layout.packed
        values, scale = scaled(order.from_dense(value))
        sizes = [value.shape[axis] for axis in order.site_axes]
        return order.to_dense((values.float() * scale).to(value.dtype), sizes)


def replace_canvases(monkeypatch: pytest.MonkeyPatch, kind: SlotKind) -> None:
    """Every canvas that a rewrite of the compiler asks for is of another kind."""
    known = CANVAS

    def canvas(self: Rewriter, value: fx.Node, name: str, before: fx.Node) -> fx.Node:
        return known(self, value, name, before, kind=kind)

    monkeypatch.setattr(Rewriter, "canvas", canvas)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        return self.second(torch.nn.functional.silu(self.first(sample)))


def compile_block() -> SparseModule:
    config = SparsifyConfig(cache=False, dense_above=1.0)
    torch.manual_seed(0)
    example = {"sample": torch.randn(2, 4, 16, 24)}
    return sparsify(Block().eval().requires_grad_(False), config, example_inputs=example)


class Sound(Canvas):
    """A canvas in bfloat16 that says all it has to; what is broken below changes one thing of it."""

    name = "tests.sound"
    holds = "else"
    rounding: ClassVar[float] = 2**-8

    def store(self, graph: fx.Graph, slot: Slot, value: fx.Node, other: SlotNode) -> fx.Node:
        packed = super().store(graph, slot, value, other)
        return graph.call_function(aten.to.dtype, (packed, torch.bfloat16))

    def store_rows(self, graph: fx.Graph, slot: Slot, rows: fx.Node, other: SlotNode) -> fx.Node:
        return graph.call_function(aten.to.dtype, (rows, torch.bfloat16))

    def stored_spec(self, slot: Slot, loaded: ValueSpec) -> ValueSpec:
        return ValueSpec(loaded.shape, torch.bfloat16)

    def load(self, graph: fx.Graph, slot: Slot, stored: fx.Node, loaded: ValueSpec, other: LoadedNode) -> fx.Node:
        return graph.call_function(aten.to.dtype, (stored, loaded.dtype))

    def recorded(self, slot: Slot, value: Tensor) -> Tensor:
        return super().recorded(slot, value).bfloat16()

    def pinned(self, slot: Slot, value: Tensor) -> Tensor:
        return value.bfloat16().to(value.dtype)


def broken(changes: dict[str, Any], base: type[SlotKind] = Sound) -> type[SlotKind]:
    return register_slot_kind(type("Broken", (base,), {"name": "tests.broken", "__module__": __name__, **changes}))


def refusal_of(kind: SlotKind, monkeypatch: pytest.MonkeyPatch) -> FiseditError:
    """What compiling a program with slots of the kind raises."""
    replace_canvases(monkeypatch, kind)
    with pytest.raises(FiseditError) as caught:
        compile_block()
    return caught.value
