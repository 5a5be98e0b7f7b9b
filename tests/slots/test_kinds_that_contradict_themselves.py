"""A kind of slots that contradicts itself is refused when a program is compiled: kind, slot, mistake and remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import pytest
import sympy
import torch
from torch import Tensor, fx

from fisedit_compiler.errors import ConfigError, SlotKindError
from fisedit_compiler.extend import (
    Canvas,
    Dense,
    LoadedNode,
    Rewriter,
    RowForm,
    Slot,
    SlotNode,
    ValueSpec,
    register_slot_kind,
)
from fisedit_compiler.graph.layout import Layout
from fisedit_compiler.graph.sizes import BATCH, HEIGHT, WIDTH, row_symbol
from fisedit_compiler.slots import registry
from fisedit_compiler.slots.agreement import Use, check, check_agreement
from tests.slots.kinds_from_outside import CANVAS, Sound, broken, compile_block, refusal_of, replace_canvases
from tests.support.layouts import LEVEL, ROLES

aten = torch.ops.aten
MAP = Layout(ROLES["map"])


def raises(*arguments: Any) -> Any:
    raise ZeroDivisionError("oh")


def gives(answer: Any) -> Callable[..., Any]:
    return lambda *arguments: answer


def makes(target: Any, *more: Any) -> Callable[..., fx.Node]:
    """Of a method that gets a graph, a slot and a node: another node made of it, after what it should be."""
    return lambda self, graph, slot, node, *others: graph.call_function(target, (node, *more))


def then(method: str, target: Any, *more: Any) -> Callable[..., fx.Node]:
    """What a sound kind makes, and one operation more."""

    def made(self: Any, graph: fx.Graph, *arguments: Any) -> fx.Node:
        return graph.call_function(target, (getattr(Sound, method)(self, graph, *arguments), *more))

    return made


def changed(method: str, change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """What a sound kind gives, and something done to it."""
    return lambda self, *arguments: change(getattr(Sound, method)(self, *arguments))


def strange_spec(shape: Any, dtype: Any = torch.bfloat16) -> Callable[..., ValueSpec]:
    return lambda self, slot, loaded: ValueSpec(shape(loaded.shape) if callable(shape) else shape, dtype)


def another_graph(self: Any, graph: fx.Graph, slot: Slot, node: fx.Node, *others: Any) -> fx.Node:
    return fx.Graph().placeholder("elsewhere")


def form(level: int = 1, dim: int = 1) -> Callable[..., RowForm]:
    return lambda self, slot: RowForm(slot.layout.level * level, dim)


GRAPHS = ("store", "load", "store_rows")
METHODS = (
    *GRAPHS,
    "stored_spec",
    "row_form",
    "written",
    "problem",
    "batch_axes",
    "recorded",
    "edited",
    "read",
    "pinned",
)

BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    **{f"{method} raises": ({method: raises}, rf"{method}\(\) raised ZeroDivisionError: oh") for method in METHODS},
    **{
        f"{method} gives None": ({method: gives(None)}, rf"{method}\(\) gave None")
        for method in METHODS
        if method != "batch_axes"
    },
    **{f"{method} gives rubbish": ({method: gives(object())}, rf"{method}\(\) gave <object") for method in METHODS},
    **{f"{method} takes nothing": ({method: lambda: None}, rf"{method}\(\) raised TypeError") for method in METHODS},
    **{f"{method} of another graph": ({method: another_graph}, "no node of the graph") for method in GRAPHS},
    **{f"{method} fails": ({method: makes(aten.view.dtype)}, "cannot be computed") for method in GRAPHS},
    **{f"{method} gives a size": ({method: makes(aten.sym_size.int, 0)}, "no tensor") for method in GRAPHS},
    "store of another shape": ({"store": then("store", aten.unsqueeze.default, 0)}, r"store\(\) makes .*stored_spec"),
    "store of another dtype": ({"store": then("store", aten.to.dtype, torch.float32)}, r"store\(\) .*stored_spec"),
    "store of another value": ({"store": then("store", aten.mul.Tensor, 2)}, "store"),
    "load of another shape": ({"load": then("load", aten.unsqueeze.default, 0)}, r"load\(\) gives .* where readers"),
    "load of another dtype": ({"load": then("load", aten.to.dtype, torch.float64)}, r"load\(\) gives .* where readers"),
    "load of another value": ({"load": then("load", aten.mul.Tensor, 2)}, r"load\(\) does not give back"),
    "load missing": ({"load": Canvas.load}, r"load\(\) gives bfloat16 .* where readers"),
    "load and read of another value": (
        {"load": then("load", aten.mul.Tensor, 2), "read": lambda self, slot, stored, slots: stored.float() * 2},
        r"load\(\) does not give back",
    ),
    "store_rows of another shape": (
        {"store_rows": makes(aten.unsqueeze.default, 0), "store": Canvas.store, "stored_spec": Canvas.stored_spec,
         "recorded": Canvas.recorded},
        r"store_rows\(\) makes",
    ),
    "stored_spec missing": ({"stored_spec": Canvas.stored_spec}, r"stored_spec\(\) says float32"),
    "stored_spec of another shape": ({"stored_spec": strange_spec(lambda shape: shape[1:])}, r"stored_spec\(\) says"),
    "stored_spec of rubbish": ({"stored_spec": strange_spec(("a", None))}, r"stored_spec\(\) gave"),
    "stored_spec of a size that no call has": (
        {"stored_spec": strange_spec(lambda shape: (*shape[1:], sympy.Symbol("x")))}, r"stored_spec\(\) gave .*x"
    ),
    "stored_spec of numbers that are none of sympy": ({"stored_spec": strange_spec((2, 6, 4))}, r"sympy\.Integer"),
    "stored_spec of no shape": ({"stored_spec": strange_spec(None)}, r"stored_spec\(\) gave"),
    "stored_spec without a dtype": ({"stored_spec": strange_spec(tuple, "bfloat16")}, r"stored_spec\(\) gave"),
    "row_form on another axis": ({"row_form": form(dim=2)}, r"row_form\(\)"),
    "row_form on no axis": ({"row_form": form(dim=7)}, r"row_form\(\)"),
    "row_form of another level": ({"row_form": form(level=2)}, r"row_form\(\) names level 2"),
    "batch_axes on another axis": ({"batch_axes": gives((1, 1))}, r"batch_axes\(\) says that axis 1"),
    "batch_axes on no axis": ({"batch_axes": gives((9, 0))}, r"batch_axes\(\) gives axis 9"),
    "batch_axes of rows on another axis": ({"batch_axes": gives((0, 2))}, r"batch_axes\(\) says that axis 2 of rows"),
    "batch_axes of shared samples": ({"batch_axes": gives((None, None))}, r"batch_axes\(\) says that no axis"),
    "batch_axes of three": ({"batch_axes": gives((0, 0, 0))}, "neither None nor two axes"),
    "batch_axes of a text": ({"batch_axes": gives(("b", 0))}, "'b' is no axis"),
    "recorded of another shape": ({"recorded": changed("recorded", lambda x: x[None])}, r"recorded\(\)"),
    "recorded of another dtype": ({"recorded": Canvas.recorded}, r"recorded\(\)"),
    "recorded of another value": ({"recorded": changed("recorded", lambda x: x + 1)}, r"recorded\(\)"),
    "edited of another value": (
        {"edited": lambda self, slot, base, edited: self.recorded(slot, base)}, "after an edit, .*what is stored"
    ),
    "read of another value": ({"read": lambda self, slot, stored, slots: stored * 2}, r"read\(\)"),
    "pinned of another shape": ({"pinned": changed("pinned", lambda x: x[:1])}, r"pinned\(\) gives"),
    "pinned of another value": ({"pinned": changed("pinned", lambda x: x * 2)}, r"pinned\(\) says"),
    "written of nothing": ({"written": lambda self, slot, before, edit: before}, r"written\(\) gave None"),
    "written that forgets an edit": (
        {"written": lambda self, slot, before, edit: before or Sound.written(self, slot, before, edit)},
        "after an edit of an edit",
    ),
    "written that forgets earlier edits": (
        {"written": lambda self, slot, before, edit: Sound.written(self, slot, None, edit)}, "after an edit of an edit"
    ),
    "a rounding that is larger than said": ({"rounding": 2**-14}, "does not give back what store"),
    "no rounding said": ({"rounding": 0.0}, "say as rounding"),
    "a kind that says it holds the packed value": ({"rounding": 0.0, "holds": "packed"}, "what store.* is not that"),
    "a kind that says it holds the value": ({"rounding": 0.0, "holds": "value"}, "what store.* is not that"),
    "another slot": (
        {"store": lambda self, graph, slot, value, other: other("first.output")}, "is not the one that"
    ),
    "a reason": ({"problem": gives("wants eight channels")}, "wants eight channels"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def kinds(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))
    monkeypatch.setattr(check, "_agreed", set())
    yield


def test_a_sound_kind_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_canvases(monkeypatch, register_slot_kind(Sound)())
    compiled = compile_block()
    with compiled.record():
        compiled(sample=torch.randn(2, 4, 16, 24))
    assert compiled.check(torch.ones(16, 24, dtype=torch.bool))


@pytest.mark.parametrize("case", BROKEN)
def test_it_is_refused_when_it_is_compiled(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, words = BROKEN[case]
    refusal = refusal_of(broken(changes)(), monkeypatch)
    assert isinstance(refusal, SlotKindError)
    refusal_says = pytest.RaisesExc(SlotKindError, match=words)
    assert refusal_says.matches(refusal), str(refusal)
    text = str(refusal)
    assert "'tests.broken'" in text and "kinds_from_outside.Broken" in text, text
    assert "first.input" in text or "second.input" in text, text
    assert "disabled_passes" not in text and text.endswith("."), text
    if "raises" in case:
        assert isinstance(refusal.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(("method", "words"), [("store_rows", r"store_rows\(\)"), ("load", r"load\(\)")])
def test_a_kind_of_one_dtype_that_forgets_half_of_a_pair_is_refused(
    method: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing has another shape then: the picture of an edit, or of an edit of an edit, would be wrong."""
    twice = {
        "rounding": 0.0,
        "store": lambda self, graph, slot, value, other: graph.call_function(
            aten.mul.Tensor, (Canvas.store(self, graph, slot, value, other), 2)
        ),
        "store_rows": makes(aten.mul.Tensor, 2),
        "load": makes(aten.mul.Tensor, 0.5),
        "recorded": lambda self, slot, value: Canvas.recorded(self, slot, value) * 2,
        "read": lambda self, slot, stored, slots: stored / 2,
        "holds": "else",
    }
    compile_with = broken(twice, Canvas)
    with monkeypatch.context() as patch:
        replace_canvases(patch, compile_with())
        compile_block()
    registry._KINDS.pop("tests.broken")
    del twice[method]
    assert pytest.RaisesExc(SlotKindError, match=words).matches(refusal_of(broken(twice, Canvas)(), monkeypatch))


def test_a_reason_names_kind_and_slot_and_no_pass_to_disable(monkeypatch: pytest.MonkeyPatch) -> None:
    text = str(refusal_of(broken({"problem": gives("wants eight channels")})(), monkeypatch))
    assert "first.input" in text and "'tests.broken'" in text and "wants eight channels" in text
    assert "defect of the pass" not in text and "ask for another" in text


def test_a_slot_about_none_names_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = register_slot_kind(Sound)()

    def canvas(self: Rewriter, value: fx.Node, name: str, before: fx.Node) -> fx.Node:
        return CANVAS(self, value, name, before, kind=kind, of="gone")

    monkeypatch.setattr(Rewriter, "canvas", canvas)
    with pytest.raises(SlotKindError, match=r"first\.input.*'tests\.sound'.*about slot gone, which is not there"):
        compile_block()


def test_output_slots_are_tried_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = register_slot_kind(type("Dim", (Dense,), {"name": "tests.dim", "row_form": form(dim=1)}))
    monkeypatch.setattr("fisedit_compiler.passes.base.Dense", kind)
    monkeypatch.setattr("fisedit_compiler.passes.rewrites.outputs.Dense", kind)
    with pytest.raises(SlotKindError, match=r"output.*'tests\.dim'.*row_form\(\)"):
        compile_block()


def test_what_agreed_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_canvases(monkeypatch, register_slot_kind(Sound)())
    compile_block()
    monkeypatch.setattr(check, "Trial", None)
    compile_block()


def test_what_has_no_kernel_on_a_cpu_is_tried_where_the_program_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second name of the CPU stands for the other device."""
    devices = []

    class Elsewhere(check.Trial):
        def run(self) -> None:
            devices.append(str(self.example.device))
            super().run()

    def only_there(value: Tensor) -> Tensor:
        if devices == ["cpu"]:
            raise NotImplementedError("no kernel")
        return value.bfloat16()

    monkeypatch.setattr(check, "Trial", Elsewhere)
    kind = broken({"store_rows": makes(only_there)})()
    use = Use(
        Slot("first.input", "value", kind, MAP),
        ValueSpec((BATCH, sympy.Integer(4), HEIGHT, WIDTH), torch.float32),
        ValueSpec((BATCH, HEIGHT * WIDTH, sympy.Integer(4)), torch.float32),
        ValueSpec((BATCH, row_symbol(LEVEL), sympy.Integer(4)), torch.float32),
    )
    with pytest.raises(SlotKindError, match="no kernel"):
        check_agreement([use])
    devices.clear()
    check_agreement([use], "cpu:0")
    assert devices == ["cpu", "cpu:0"]


VALUE = ValueSpec((BATCH, sympy.Integer(4), HEIGHT, WIDTH), torch.float32)
CANVAS_SPEC = ValueSpec((BATCH, HEIGHT * WIDTH, sympy.Integer(4)), torch.float32)


def test_a_slot_that_edits_compute_anew_is_stored_as_readers_get_it() -> None:
    """What an edit computes of it goes to the recording as it is: there is no method that it passes through."""
    use = Use(Slot("norm.statistics", "value", register_slot_kind(Sound)(), MAP), VALUE, CANVAS_SPEC, whole=True)
    with pytest.raises(SlotKindError, match=r"norm\.statistics.*'tests\.sound'.*computes the slot anew"):
        check_agreement([use])


def test_rows_in_an_order_that_nobody_knows_are_looked_at_by_shape() -> None:
    """A rewrite may hand over rows that are no rows of the value; what a kind makes of them must fit all the same."""
    merged = ValueSpec((BATCH, row_symbol(LEVEL), sympy.Integer(4)), torch.float64)
    slot = Slot("first.input", "value", register_slot_kind(Sound)(), MAP)
    check_agreement([Use(slot, VALUE, CANVAS_SPEC, merged)])
    wrong = ValueSpec((BATCH, row_symbol(LEVEL), sympy.Integer(5)), torch.float32)
    with pytest.raises(SlotKindError, match=r"store_rows\(\) makes bfloat16 \[2, 3, 5\]"):
        check_agreement([Use(slot, VALUE, CANVAS_SPEC, wrong)])


def test_a_step_that_does_not_follow_the_values_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteenths of one are fine for values around one, and all that is left of smaller ones is zero."""

    class Sixteenths(Canvas):
        name = "tests.sixteenths"
        holds = "else"
        rounding: ClassVar[float] = 2**-4

        def store(self, graph: fx.Graph, slot: Slot, value: fx.Node, other: SlotNode) -> fx.Node:
            return self.store_rows(graph, slot, super().store(graph, slot, value, other), other)

        def store_rows(self, graph: fx.Graph, slot: Slot, rows: fx.Node, other: SlotNode) -> fx.Node:
            return graph.call_function(aten.round.default, (graph.call_function(aten.mul.Tensor, (rows, 16)),))

        def load(self, graph: fx.Graph, slot: Slot, stored: fx.Node, loaded: ValueSpec, other: LoadedNode) -> fx.Node:
            return graph.call_function(aten.div.Tensor, (stored, 16))

        def recorded(self, slot: Slot, value: Tensor) -> Tensor:
            return (super().recorded(slot, value) * 16).round()

        def read(self, slot: Slot, stored: Tensor, slots: Mapping[str, Tensor]) -> Tensor:
            return stored / 16

        def pinned(self, slot: Slot, value: Tensor) -> Tensor:
            return (value * 16).round() / 16

    with pytest.raises(SlotKindError, match="does not give back what store"):
        replace_canvases(monkeypatch, register_slot_kind(Sixteenths)())
        compile_block()


def test_copies_name_a_kind_that_cannot_tell_samples_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_canvases(monkeypatch, broken({"batch_axes": gives(None)})())
    compiled = compile_block()
    sample = torch.randn(2, 4, 16, 24)
    with compiled.record() as recording:
        compiled(sample=sample)
    words = pytest.raises(ConfigError, match=r"first\.input .*kind 'tests\.broken' cannot take apart")
    with words, compiled.edit(recording, torch.ones(16, 24, dtype=torch.bool), copies=2):
        compiled(sample=sample.repeat_interleave(2, 0))
