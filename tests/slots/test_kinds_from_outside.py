"""Kinds of slots that another package brings: canvases as float8, one scale a token, in place of the compiler's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar, Literal

import pytest
import torch
from torch import Tensor, fx, nn

from fisedit_compiler import SparseModule, SparsifyConfig, sparsify
from fisedit_compiler.errors import ConfigError, VerificationError
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
    spec_of,
)
from fisedit_compiler.graph.site_order import SITES
from fisedit_compiler.masks import ellipse_mask
from fisedit_compiler.slots import registry

CANVAS = Rewriter.canvas
aten = torch.ops.aten
EIGHT_BITS = torch.float8_e4m3fn
LARGEST = torch.finfo(EIGHT_BITS).max
SCALE_BYTES = 4
MASK = ellipse_mask(16, 24, (0.2, 0.2, 0.6, 0.6))
INNER = ellipse_mask(16, 24, (0.35, 0.35, 0.45, 0.45))
SECOND = ellipse_mask(16, 24, (0.4, 0.1, 0.8, 0.5))
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


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))
    yield


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


@pytest.fixture
def compiled(kinds: None, monkeypatch: pytest.MonkeyPatch) -> SparseModule:
    replace_canvases(monkeypatch, register_slot_kind(EightBits)())
    return compile_block()


def changed(base: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, torch.randn_like(base), base)


def test_what_is_recorded_takes_a_byte_a_value_and_reads_as_it_was(compiled: SparseModule) -> None:
    base = torch.randn(2, 4, 16, 24)
    with compiled.record() as recording:
        before = compiled(sample=base)
    slots = recording.calls[0].slots
    assert slots["first.input"].dtype == torch.uint8 and slots["first.input"].shape == (2, 16 * 24, 4 + SCALE_BYTES)
    edited = changed(base, MASK)
    with compiled.edit(recording, MASK):
        after = compiled(sample=edited)
    assert torch.equal(after[..., ~MASK], before[..., ~MASK])
    torch.testing.assert_close(after[..., INNER], compiled.original(edited)[..., INNER], atol=1e-5, rtol=1e-5)


def test_check_expects_what_the_kind_says(compiled: SparseModule) -> None:
    with compiled.record():
        compiled(sample=torch.randn(2, 4, 16, 24))
    assert compiled.check(MASK), compiled.check(MASK)
    report = compiled.explain(MASK)
    assert {"tests.eight_bits", "dense"} == {row.kind for row in report.programs[0].slots}


def test_check_finds_a_kind_that_reads_something_else(kinds: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(EightBits):
        name = "tests.doubled"

        def load(self, graph: fx.Graph, slot: Slot, stored: fx.Node, loaded: ValueSpec, other: LoadedNode) -> fx.Node:
            return graph.call_function(aten.mul.Tensor, (super().load(graph, slot, stored, loaded, other), 2))

    replace_canvases(monkeypatch, register_slot_kind(Doubled)())
    compiled = compile_block()
    with compiled.record():
        compiled(sample=torch.randn(2, 4, 16, 24))
    assert not compiled.check(MASK)


def two_edits(compiled: SparseModule, copies: int) -> tuple[Tensor, Tensor, torch.dtype]:
    """What an edit gives, and an edit of that edit, and how a canvas of the first one is stored."""
    torch.manual_seed(1)
    base = torch.randn(2, 4, 16, 24)
    with compiled.record() as recording:
        compiled(sample=base)
    once = changed(base, MASK)
    with compiled.edit(recording, MASK, record=True, copies=copies) as session:
        first = compiled(sample=once.repeat_interleave(copies, 0))[::copies]
    turn = session.results[0]
    with compiled.edit(turn, SECOND):
        second = compiled(sample=changed(once, SECOND))
    assert torch.equal(second[..., ~SECOND], first[..., ~SECOND])
    return first, second, turn.calls[0].slots["second.input"].dtype


@pytest.mark.parametrize("copies", [1, 2])
def test_an_edit_of_an_edit_and_of_copies(compiled: SparseModule, copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    *rounded, stored_as = two_edits(compiled, copies)
    replace_canvases(monkeypatch, Canvas())
    *exact, plain = two_edits(compile_block(), copies)
    assert (stored_as, plain) == (torch.uint8, torch.float32)
    for found, expected in zip(rounded, exact, strict=True):
        assert 0 < (found - expected).abs().max() < ROUNDING * expected.abs().max()


def test_a_kind_that_nobody_registered_is_refused_when_it_is_compiled(
    kinds: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_canvases(monkeypatch, EightBits())
    with pytest.raises(ConfigError, match=r"No slot kind is called 'tests\.eight_bits'"):
        compile_block()


def test_a_kind_that_holds_no_dense_values_cannot_be_what_rows_are_put_over(
    kinds: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    @register_slot_kind
    class Else(Canvas):
        name = "tests.else"
        holds = "else"

        def problem(self, slot: Slot, value: ValueSpec, loaded: ValueSpec) -> str:
            return ""

    monkeypatch.setattr("fisedit_compiler.passes.base.Dense", Else)
    with pytest.raises(VerificationError, match=r"whose kind tests\.else holds no dense values"):
        compile_block()


class About(Canvas):
    """A canvas that is only right together with another slot."""

    name: ClassVar[str] = "tests.about"
    holds: ClassVar[Literal["value", "packed", "else"]] = "else"

    def store(self, graph: fx.Graph, slot: Slot, value: fx.Node, other: SlotNode) -> fx.Node:
        if slot.of:
            other(slot.of)
        return super().store(graph, slot, value, other)


def compile_about(monkeypatch: pytest.MonkeyPatch, about: dict[str, str]) -> SparseModule:
    """The first convolution reads slot ``a``; ``about`` says which slot each is about."""

    def canvas(self: Rewriter, value: fx.Node, name: str, before: fx.Node) -> fx.Node:
        if name != "first.input":
            return CANVAS(self, value, name, before)
        layout = value.meta["layout"]
        self.program.slots.update({slot: self.slot(slot, value, About(), of) for slot, of in about.items()})
        spec = layout.packed.spec(spec_of(value), self.site_count(layout.level))
        return self.load(self.program.slots["a"], spec, before)

    register_slot_kind(About)
    monkeypatch.setattr(Rewriter, "canvas", canvas)
    return compile_block()


def test_slots_about_slots_about_slots_are_all_recorded(kinds: None, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compile_about(monkeypatch, {"c": "", "b": "c", "a": "b"})
    base = torch.randn(2, 4, 16, 24)
    with compiled.record() as recording:
        before = compiled(sample=base)
    assert {"a", "b", "c"} <= set(recording.calls[0].slots)
    with compiled.edit(recording, MASK):
        assert torch.equal(compiled(sample=changed(base, MASK))[..., ~MASK], before[..., ~MASK])


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"a": "gone"}, "stored about slot gone, which is not there"),
        ({"b": "a", "a": "b"}, "about each other: a, b, a"),
    ],
)
def test_slots_about_none_or_each_other_are_refused(
    about: dict[str, str], words: str, kinds: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(VerificationError, match=words):
        compile_about(monkeypatch, about)


@pytest.mark.parametrize("where", ["store", "store_rows", "load"])
def test_a_kind_that_writes_in_place_is_refused_when_it_is_compiled(
    where: str, kinds: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would change the recording at every edit, or the caller's own sample."""

    @register_slot_kind
    class InPlace(Canvas):
        name = "tests.in_place"
        holds = "else"

        def store(self, graph: fx.Graph, slot: Slot, value: fx.Node, other: SlotNode) -> fx.Node:
            return self.doubled(graph, super().store(graph, slot, value, other), where == "store")

        def store_rows(self, graph: fx.Graph, slot: Slot, rows: fx.Node, other: SlotNode) -> fx.Node:
            return self.doubled(graph, rows, where == "store_rows")

        def load(self, graph: fx.Graph, slot: Slot, stored: fx.Node, loaded: ValueSpec, other: LoadedNode) -> fx.Node:
            return self.doubled(graph, stored, where == "load")

        def doubled(self, graph: fx.Graph, value: fx.Node, in_place: bool) -> fx.Node:
            return graph.call_function(aten.mul_.Tensor if in_place else aten.mul.Tensor, (value, 2))

    replace_canvases(monkeypatch, InPlace())
    with pytest.raises(VerificationError, match=r"mul_.* writes to its argument.*slot kind"):
        compile_block()
