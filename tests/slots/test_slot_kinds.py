"""What every kind of slots says of its values agrees with what the graphs compute of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch
from torch import Tensor, fx

from fisedit_compiler.errors import ConfigError
from fisedit_compiler.graph.layout import Layout, image
from fisedit_compiler.slots import registry
from fisedit_compiler.slots.base import Slot, SlotKind, SlotNode
from fisedit_compiler.slots.canvas import Canvas
from fisedit_compiler.slots.dense import Dense
from fisedit_compiler.slots.map import Map
from fisedit_compiler.slots.registry import check_kind, register_slot_kind, slot_kind
from fisedit_compiler.slots.site_sums import SiteSums
from fisedit_compiler.slots.statistics import Statistics
from tests.support.layouts import ROLES, value_of

GROUPS = 3
MAP = Layout(ROLES["map"])
LAYOUTS = [pytest.param(Layout(roles), id=name) for name, roles in ROLES.items()]
BY_SITES = [Canvas(), Dense()]
BY_GROUPS = [Statistics(GROUPS, corrected=True), SiteSums(GROUPS, GROUPS)]


def named(kind: SlotKind) -> str:
    return kind.name


def slot_of(kind: SlotKind, layout: Layout) -> Slot:
    return Slot("slot", "value", kind, layout, of="statistics")


def stored(slot: Slot, value: Tensor) -> Tensor:
    """What the recording graph computes of a value."""
    graph = fx.Graph()
    dense = graph.placeholder("value")
    centre = Slot("statistics", "value", Statistics(GROUPS, corrected=True), slot.layout)

    def other(name: str) -> fx.Node:
        assert name == centre.name
        return centre.kind.store(graph, centre, dense, other)

    graph.output(slot.kind.store(graph, slot, dense, other))
    result = fx.GraphModule({}, graph)(value)
    assert isinstance(result, Tensor)
    return result


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", BY_SITES, ids=named)
def test_what_is_stored_is_what_is_expected(kind: SlotKind, layout: Layout) -> None:
    value = value_of(layout)
    assert torch.equal(stored(slot_of(kind, layout), value), kind.recorded(slot_of(kind, layout), value))


@pytest.mark.parametrize("kind", BY_GROUPS, ids=named)
def test_what_a_norm_reads_is_what_is_expected(kind: SlotKind) -> None:
    slot = slot_of(kind, MAP)
    value = torch.randn(2, GROUPS, 4, 5)
    torch.testing.assert_close(stored(slot, value), kind.recorded(slot, value))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", BY_SITES, ids=named)
def test_rows_are_written_where_they_lie(kind: SlotKind, layout: Layout) -> None:
    """Writing the rows of a changed value gives what would be stored of it, and nothing else changes."""
    slot, before, after, sites = (
        slot_of(kind, layout),
        value_of(layout),
        value_of(layout, offset=1000),
        torch.tensor([0, 2, 5]),
    )
    form = kind.row_form(slot)
    held, wanted = kind.recorded(slot, before), kind.recorded(slot, after)
    written = form.write(held, sites, form.gather(wanted, sites))
    count = layout.packed.from_dense(before).shape[layout.site_dim()]
    others = torch.tensor([site for site in range(count) if site not in sites.tolist()])
    assert written.shape == held.shape
    assert torch.equal(form.gather(written, sites), form.gather(wanted, sites))
    assert torch.equal(form.gather(written, others), form.gather(held, others))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", BY_SITES, ids=named)
def test_samples_are_taken_apart_where_they_lie(kind: SlotKind, layout: Layout) -> None:
    """Of a value and of its rows, whichever axis of the dense value counts the samples."""
    slot, value, sites = slot_of(kind, layout), value_of(layout), torch.tensor([1, 3])
    form, whole = kind.row_form(slot), kind.recorded(slot, value)
    for axis in set(range(layout.rank)) - set(layout.axes):
        axes = kind.batch_axes(slot, axis)
        assert axes is not None and None not in axes
        in_value, in_rows = axes
        part = kind.recorded(slot, value.narrow(axis, 1, 1))
        assert in_value is not None and torch.equal(whole.narrow(in_value, 1, 1), part)
        assert in_rows is not None
        assert torch.equal(form.gather(whole, sites).narrow(in_rows, 1, 1), form.gather(part, sites))


@pytest.mark.parametrize("kind", [*BY_GROUPS, Map()], ids=named)
def test_samples_of_what_is_not_by_sites_are_first_or_not_told_apart(kind: SlotKind) -> None:
    slot = slot_of(kind, MAP)
    assert kind.batch_axes(slot, 0) == (0, 0) and kind.batch_axes(slot, 1) is None


@pytest.mark.parametrize("layout", [MAP, Layout(ROLES["tokens"])], ids=str)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bool, torch.int8, torch.bfloat16])
@pytest.mark.parametrize("kind", BY_SITES, ids=named)
def test_rows_of_every_dtype_are_written(kind: SlotKind, dtype: torch.dtype, layout: Layout) -> None:
    slot, value, sites = slot_of(kind, layout), torch.randn(value_of(layout).shape).to(dtype), torch.tensor([1, 2])
    form, held = kind.row_form(slot), kind.recorded(slot, value)
    rows = torch.ones_like(form.gather(held, sites).float()).to(dtype)
    written = form.write(held, sites, rows)
    assert written.dtype == dtype
    assert torch.equal(form.gather(written, sites).float(), rows.float())
    again = form.write(written, sites, form.gather(held, sites))
    assert torch.equal(again.float(), held.float())


def test_kinds_of_equal_parameters_are_equal() -> None:
    assert Statistics(4, corrected=True) == Statistics(4, corrected=True) != Statistics(4, corrected=False)
    assert Statistics(4, corrected=True) != Statistics(8, corrected=True)
    assert Canvas() == Canvas() != Dense() and hash(Canvas()) == hash(Canvas())


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))
    yield


def kind_called(text: str | None, base: type[SlotKind] = Canvas, **fields: object) -> type[SlotKind]:
    named = {} if text is None else {"name": text}
    return type("Mine", (base,), {**named, **fields})


@pytest.mark.usefixtures("kinds")
class TestRegistering:
    def test_a_registered_kind_is_found_by_its_name(self) -> None:
        mine = register_slot_kind(kind_called("tests.mine"))
        assert slot_kind("tests.mine") is mine
        check_kind(mine())

    def test_a_name_that_is_taken_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"called 'canvas' already: fisedit_compiler\.slots\.canvas\.Canvas"):
            register_slot_kind(kind_called("canvas"))

    def test_a_module_that_is_loaded_again_registers_the_same_kind_again(self) -> None:
        register_slot_kind(kind_called("tests.mine"))
        again = register_slot_kind(kind_called("tests.mine"))
        assert slot_kind("tests.mine") is again

    def test_a_kind_without_a_name_of_its_own_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="no `name` of its own"):
            register_slot_kind(kind_called(None))

    def test_a_kind_that_does_not_say_everything_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"define batch_axes\(\) and recorded\(\) and store\(\)"):
            register_slot_kind(kind_called("tests.mine", SlotKind))

    @pytest.mark.parametrize("text", ["", " ", "a b", "a\nb", 3, None, [], "[red]"])
    def test_a_name_that_pages_cannot_show_is_refused(self, text: object) -> None:
        with pytest.raises(ConfigError, match="say letters, digits, dots and dashes"):
            register_slot_kind(type("Mine", (Canvas,), {"name": text}))

    @pytest.mark.parametrize("fields", [{"holds": "nonsense"}, {"holds": "else", "rounding": -1.0},
                                        {"holds": "else", "rounding": float("nan")}])  # fmt: skip
    def test_what_a_kind_says_of_itself_is_checked(self, fields: dict[str, object]) -> None:
        with pytest.raises(ConfigError, match="rounding a share from 0 to 1"):
            register_slot_kind(kind_called("tests.mine", **fields))

    def test_something_else_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"subclass of fisedit_compiler\.extend\.SlotKind"):
            register_slot_kind(dict)  # type: ignore[type-var]

    @pytest.mark.parametrize("base", [Canvas, Dense])
    def test_a_kind_that_rounds_what_is_compared_bit_for_bit_is_refused(self, base: type[SlotKind]) -> None:
        with pytest.raises(ConfigError, match="that reading it rounds"):
            register_slot_kind(kind_called("tests.mine", base, rounding=0.1))

    def test_a_slot_of_an_unregistered_kind_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"No slot kind is called 'tests\.mine'"):
            check_kind(kind_called("tests.mine")())
        register_slot_kind(kind_called("tests.mine"))
        with pytest.raises(ConfigError, match="is not the registered slot kind"):
            check_kind(kind_called("tests.mine", Dense)())
        with pytest.raises(ConfigError, match="got 'canvas'"):
            check_kind("canvas")


def test_reading_what_was_stored_gives_the_value_unless_a_kind_says_otherwise() -> None:
    class Plain(SlotKind):
        name: ClassVar[str] = "tests.plain"

        def store(self, graph: fx.Graph, slot: Slot, value: fx.Node, other: SlotNode) -> fx.Node:
            return value

        def batch_axes(self, slot: Slot, axis: int) -> tuple[int | None, int | None] | None:
            return None

        def recorded(self, slot: Slot, value: Tensor) -> Tensor:
            return value

    slot, value = Slot("slot", "value", Plain(), image(MAP.level)), torch.randn(3)  # type: ignore[arg-type]
    assert slot.kind.read(slot, value, {}) is value and slot.kind.pinned(slot, value) is value
    assert slot.kind.edited(slot, value, value + 1) is not value
