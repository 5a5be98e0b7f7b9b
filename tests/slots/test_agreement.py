"""The package's own kinds of slots, and those of the examples, agree with themselves, whatever the layout and dtype."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fisedit_compiler.errors import SlotKindError
from fisedit_compiler.graph.axis_roles import Batch, Channel, Role, Sites
from fisedit_compiler.graph.layout import Layout
from fisedit_compiler.graph.sizes import BATCH, HEIGHT, WIDTH, row_symbol
from fisedit_compiler.graph.specs import ValueSpec
from fisedit_compiler.slots import registry
from fisedit_compiler.slots.agreement import Use, check, check_agreement
from fisedit_compiler.slots.base import Slot, SlotKind
from fisedit_compiler.slots.canvas import Canvas
from fisedit_compiler.slots.dense import Dense
from fisedit_compiler.slots.map import Map
from fisedit_compiler.slots.site_sums import SiteSums
from fisedit_compiler.slots.statistics import Statistics
from tests.slots.kinds_from_outside import EightBits
from tests.support.layouts import LEVEL, ROLES

GROUPS, CHANNELS = 3, 6
MAP, TOKENS = Layout(ROLES["map"]), Layout(ROLES["tokens"])
PAIR = (sympy.Integer(GROUPS), sympy.Integer(2))
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int64, torch.bool]


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_agreed", set())


def halved() -> SlotKind:
    """The kind of ``examples/third_party_op.py``."""
    path = Path(__file__).parents[2] / "examples" / "third_party_op.py"
    spec = importlib.util.spec_from_file_location("third_party_op", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kind: SlotKind = module.Halved()
    return kind


def size_of(role: Role, factor: int = 1, channels: int = CHANNELS, batch: int = 1) -> sympy.Expr:
    """A size of an axis, where a level has ``factor`` times ``h`` by ``w`` sites."""
    if isinstance(role, Sites):
        sides = {"height": factor * HEIGHT, "width": factor * WIDTH, "both": factor**2 * HEIGHT * WIDTH}
        return sides[role.side]
    return batch * BATCH if isinstance(role, Batch) else sympy.Integer(channels)


def spec_of(layout: Layout, dtype: torch.dtype = torch.float32, **sizes: int) -> ValueSpec:
    return ValueSpec(tuple(size_of(role, **sizes) for role in layout.roles), dtype)


def by_sites(kind: SlotKind, layout: Layout, value: ValueSpec) -> Use:
    """A slot whose readers get its value, and whose rows an edit writes."""
    packed = kind.holds != "value"
    order = layout.packed if packed else layout.flat
    loaded = order.spec(value) if packed else value
    return Use(Slot("slot", "value", kind, layout), value, loaded, order.spec(value, row_symbol(LEVEL)))


def norm(layout: Layout, value: ValueSpec) -> list[Use]:
    """What a GroupNorm reads whose statistics edits correct."""
    batch, sites = value.shape[0], sympy.Mul(*(value.shape[axis] for axis in layout.axes))
    statistics = Slot("statistics", "value", Statistics(GROUPS, corrected=True), layout)
    sums = Slot("sums", "value", SiteSums(GROUPS, CHANNELS), layout, of="statistics")
    rows = ValueSpec((batch, row_symbol(LEVEL), value.shape[1]), value.dtype)
    return [
        Use(sums, value, ValueSpec((batch, sites, *PAIR), torch.float32), rows),
        Use(statistics, value, ValueSpec((batch, *PAIR), torch.float32), whole=True),
    ]


def tried(uses: list[Use]) -> None:
    check_agreement(uses, own=True)


KINDS = {"canvas": Canvas, "dense": Dense, "eight bits": EightBits, "halved": halved}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["canvas", "dense"])
@pytest.mark.parametrize("layout", ROLES)
def test_exact_kinds_agree_in_every_layout_and_dtype(layout: str, kind: str, dtype: torch.dtype) -> None:
    layouts = Layout(ROLES[layout])
    tried([by_sites(KINDS[kind](), layouts, spec_of(layouts, dtype))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["eight bits", "halved"])
@pytest.mark.parametrize("layout", [MAP, TOKENS], ids=str)
def test_kinds_that_round_agree(layout: Layout, kind: str, dtype: torch.dtype) -> None:
    tried([by_sites(KINDS[kind](), layout, spec_of(layout, dtype))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("roles", ["map", "tokens last"])
def test_what_a_norm_reads_agrees(roles: str, dtype: torch.dtype) -> None:
    layout = Layout(ROLES[roles])
    tried(norm(layout, spec_of(layout, dtype)))


def test_statistics_that_edits_leave_alone_and_maps_agree() -> None:
    value = spec_of(MAP)
    kept = Slot("statistics", "value", Statistics(GROUPS, corrected=False), MAP)
    tried([Use(kept, value, ValueSpec((value.shape[0], *PAIR), torch.float32))])
    heads = Layout((Batch(), Channel(), Sites(LEVEL), Channel()))
    tried([Use(Slot("map", "value", Map(), heads), spec_of(heads), spec_of(heads))])


def test_every_kind_of_the_package_is_tried_here() -> None:
    own = {name for name, kind in registry._KINDS.items() if kind.__module__.startswith("fisedit_compiler.")}
    assert own == {kind.name for kind in (Canvas, Dense, Map, SiteSums, Statistics)}


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(sorted(ROLES)),
    st.sampled_from(["canvas", "dense"]),
    st.integers(1, 8),
    st.integers(1, 5),
    st.integers(1, 3),
)
def test_exact_kinds_agree_whatever_the_sizes(roles: str, kind: str, factor: int, channels: int, batch: int) -> None:
    layout = Layout(ROLES[roles])
    tried([by_sites(KINDS[kind](), layout, spec_of(layout, factor=factor, channels=channels, batch=batch))])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(2, 5), st.integers(1, 3), st.sampled_from([1, 2]))
def test_a_wrong_axis_is_found_whatever_the_sizes(factor: int, channels: int, batch: int, axis: int) -> None:
    class Wrong(Canvas):
        name = "tests.wrong"

        def batch_axes(self, slot: Slot, dense: int) -> tuple[int | None, int | None]:
            return axis, axis

    use = by_sites(Wrong(), MAP, spec_of(MAP, factor=factor, channels=channels, batch=batch))
    with pytest.raises(SlotKindError, match=r"batch_axes\(\)"):
        tried([use])


def test_what_no_small_call_has_is_not_tried() -> None:
    odd = ValueSpec((BATCH, sympy.Integer(4), HEIGHT / 1024, WIDTH / 1024), torch.float32)
    tried([by_sites(Canvas(), MAP, odd)])
