"""Kinds of slots that another package brings: canvases as float8, one scale a token, in place of the compiler's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

import pytest
import torch
from torch import Tensor, fx, nn

from fisedit_compiler import SparseModule, SparsifyConfig, sparsify
from fisedit_compiler.errors import ConfigError, SlotKindError, VerificationError
from fisedit_compiler.extend import (
    Canvas,
    LoadedNode,
    Rewriter,
    RowForm,
    Slot,
    SlotNode,
    ValueSpec,
    register_slot_kind,
    spec_of,
)
from fisedit_compiler.masks import ellipse_mask
from fisedit_compiler.slots import registry
from tests.slots.kinds_from_outside import (
    CANVAS,
    ROUNDING,
    SCALE_BYTES,
    EightBits,
    compile_block,
    replace_canvases,
)

aten = torch.ops.aten
MASK = ellipse_mask(16, 24, (0.2, 0.2, 0.6, 0.6))
INNER = ellipse_mask(16, 24, (0.35, 0.35, 0.45, 0.45))
SECOND = ellipse_mask(16, 24, (0.4, 0.1, 0.8, 0.5))


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))
    yield


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


def test_a_kind_that_reads_something_else_is_refused_when_it_is_compiled(
    kinds: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Doubled(EightBits):
        name = "tests.doubled"

        def load(self, graph: fx.Graph, slot: Slot, stored: fx.Node, loaded: ValueSpec, other: LoadedNode) -> fx.Node:
            return graph.call_function(aten.mul.Tensor, (super().load(graph, slot, stored, loaded, other), 2))

    replace_canvases(monkeypatch, register_slot_kind(Doubled)())
    with pytest.raises(SlotKindError, match=r"first\.input.*tests\.doubled.*does not give back what store\(\) took"):
        compile_block()


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


class SitesFirst(Canvas):
    """A canvas ``[S, B, C]``."""

    name: ClassVar[str] = "tests.sites_first"
    holds: ClassVar[Literal["value", "packed", "else", "derived"]] = "else"

    def store(self, graph: fx.Graph, slot: Slot, value: fx.Node, other: SlotNode) -> fx.Node:
        return self.store_rows(graph, slot, super().store(graph, slot, value, other), other)

    def store_rows(self, graph: fx.Graph, slot: Slot, rows: fx.Node, other: SlotNode) -> fx.Node:
        moved = graph.call_function(aten.permute.default, (rows, [1, 0, 2]))
        return graph.call_function(aten.clone.default, (moved,), {"memory_format": torch.contiguous_format})

    def stored_spec(self, slot: Slot, loaded: ValueSpec) -> ValueSpec:
        batch, sites, channels = loaded.shape
        return ValueSpec((sites, batch, channels), loaded.dtype)

    def load(self, graph: fx.Graph, slot: Slot, stored: fx.Node, loaded: ValueSpec, other: LoadedNode) -> fx.Node:
        return graph.call_function(aten.permute.default, (stored, [1, 0, 2]))

    def row_form(self, slot: Slot) -> RowForm:
        assert slot.layout.level is not None
        return RowForm(slot.layout.level, 0)

    def batch_axes(self, slot: Slot, axis: int) -> tuple[int | None, int | None]:
        return 1, 1

    def recorded(self, slot: Slot, value: Tensor) -> Tensor:
        return super().recorded(slot, value).transpose(0, 1)

    def read(self, slot: Slot, stored: Tensor, slots: Mapping[str, Tensor]) -> Tensor:
        return stored.transpose(0, 1)


class WithText(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.text = nn.Linear(6, 8)

    def forward(self, sample: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        text = self.text(encoder_hidden_states.mean(1))[:, :, None, None]
        return self.second(torch.nn.functional.silu(self.first(sample) + text))


@pytest.mark.parametrize("kind", [Canvas, SitesFirst])
def test_samples_that_are_not_first_are_not_composed(
    kind: type[Canvas], kinds: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a call whose first sample is recorded already, an edit leaves the slots that its own recording would have."""
    register_slot_kind(kind)

    def canvas(self: Rewriter, value: fx.Node, name: str, before: fx.Node) -> fx.Node:
        return CANVAS(self, value, name, before, kind=kind() if name == "second.input" else Canvas())

    monkeypatch.setattr(Rewriter, "canvas", canvas)
    sample, text = torch.randn(2, 4, 16, 24), torch.randn(2, 5, 6)
    other = torch.stack([text[0], torch.randn(5, 6)])
    inputs = {"sample": sample, "encoder_hidden_states": text}
    config = SparsifyConfig(cache=False, dense_above=1.0)
    compiled = sparsify(WithText().eval().requires_grad_(False), config, example_inputs=inputs)
    with compiled.record() as recording:
        compiled(**inputs)
    with compiled.record() as whole:
        compiled(sample=sample, encoder_hidden_states=other)
    with compiled.edit(recording, record=True) as session:
        compiled(sample=sample, encoder_hidden_states=other)
    assert session.computed_samples == [1 if kind is Canvas else 2]
    assert session.result is not None
    for name, slot in session.result.calls[0].slots.items():
        torch.testing.assert_close(slot, whole.slot(0, name))


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
    holds: ClassVar[Literal["value", "packed", "else", "derived"]] = "else"

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
            return graph.call_function(aten.mul_.Tensor if in_place else aten.mul.Tensor, (value, 1))

    replace_canvases(monkeypatch, InPlace())
    with pytest.raises(VerificationError, match=r"mul_.* writes to its argument.*slot kind"):
        compile_block()
