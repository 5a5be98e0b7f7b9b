"""Moves between the dense order of a value and the orders that have its sites on one axis, on tensors."""

from __future__ import annotations

from fractions import Fraction

import pytest
import sympy
import torch

from fisedit_compiler.errors import LayoutError
from fisedit_compiler.graph.axis_roles import Joined, Role, Sites, Unknown
from fisedit_compiler.graph.layout import Layout, image, opaque
from fisedit_compiler.graph.site_order import SITES, SiteOrder
from fisedit_compiler.graph.specs import ValueSpec
from tests.support.layouts import LEVEL, ROLES, SIZES, B, C, H, S, W, value_of

SITES_WRITTEN = torch.tensor([1, 6, 7, 19])


def site_numbers(layout: Layout) -> torch.Tensor:
    """The site of every element of a dense value."""
    return layout.spread(torch.arange(20).view(4, 5)).expand([SIZES[role] for role in layout.roles])


def orders(layout: Layout) -> dict[str, SiteOrder]:
    return {"packed": layout.packed, "flat": layout.flat}


@pytest.mark.parametrize("name", ROLES)
def test_there_and_back_is_the_value(name: str) -> None:
    layout = Layout(ROLES[name])
    value = value_of(layout)
    for order in orders(layout).values():
        there = order.from_dense(value)
        spec = order.spec(ValueSpec(tuple(map(sympy.Integer, value.shape)), torch.int64))
        assert list(there.shape) == [int(size) for size in spec.shape]
        assert torch.equal(order.to_dense(there, (4, 5)), value)


@pytest.mark.parametrize("name", ROLES)
def test_the_site_axis_counts_sites_row_after_row(name: str) -> None:
    """Whatever the order of height, width and batch: ``SITES`` of the axes is the site, the others keep theirs."""
    layout = Layout(ROLES[name])
    for order in orders(layout).values():
        numbers = order.from_dense(site_numbers(layout)).movedim(order.site_dim, -1)
        assert torch.equal(numbers, torch.arange(20).expand_as(numbers))
        for position, axis in enumerate(order.axes):
            if axis != SITES:
                counted = torch.arange(value_of(layout).shape[axis]).expand_as(value_of(layout).movedim(axis, -1))
                moved = order.from_dense(counted.movedim(-1, axis)).movedim(position, -1)
                assert torch.equal(moved, torch.arange(moved.shape[-1]).expand_as(moved))


@pytest.mark.parametrize("name", ROLES)
def test_rows_are_read_and_written_where_the_sites_are(name: str) -> None:
    layout = Layout(ROLES[name])
    base, new = value_of(layout), value_of(layout, 1000)
    before = base.clone()
    selected = torch.isin(site_numbers(layout), SITES_WRITTEN)
    for order in orders(layout).values():
        rows = order.gather(new, SITES_WRITTEN)
        assert rows.shape[order.site_dim] == len(SITES_WRITTEN)
        assert torch.equal(order.write(base, SITES_WRITTEN, rows), torch.where(selected, new, base))
    assert torch.equal(base, before)


@pytest.mark.parametrize("name", ROLES)
def test_one_order_is_a_permutation_of_the_other(name: str) -> None:
    layout = Layout(ROLES[name])
    value = value_of(layout)
    flat, packed = layout.flat, layout.packed
    assert torch.equal(flat.from_dense(value).permute(flat.order_to(packed)), packed.from_dense(value))
    assert torch.equal(packed.from_dense(value).permute(packed.order_to(flat)), flat.from_dense(value))


def test_what_moves_least() -> None:
    """Where width follows height nothing is permuted; rows of a map are channels last all the same."""
    layout = image(LEVEL)
    assert not layout.flat.moves and layout.flat.axes == (0, 1, SITES)
    assert layout.packed.permutation == (0, 2, 3, 1) and layout.packed.axes == (0, SITES, 1)


def test_the_lattice_is_read_from_the_roles() -> None:
    assert str(Layout((B, C))) == "plain"
    assert str(image(Fraction(4))) == "map@4"
    assert str(Layout((B, S))) == "tokens@2"
    joined = Layout((B, Joined(frozenset({sympy.Integer(77), sympy.Symbol("n")})), C), "text beside sites")
    assert (joined.kind, joined.axes, joined.level) == ("concat", (1,), None)
    assert opaque(0, "a reason").kind == opaque(2, "a reason").kind == "opaque"


@pytest.mark.parametrize(
    "roles",
    [(H, C), (H, H), (H, W, S), (S, S), (H, Sites(Fraction(1), "width")), (Joined(frozenset()), S), (Unknown(), C)],
    ids=str,
)
def test_roles_that_no_value_has_are_refused(roles: tuple[Role, ...]) -> None:
    with pytest.raises(LayoutError):
        Layout(roles)


def test_a_map_with_a_reason_is_refused() -> None:
    with pytest.raises(LayoutError, match="reason"):
        Layout((B, C, H, W), "of a reason")


def test_equal_sites_do_not_ask_for_equal_channels() -> None:
    assert Layout((B, C, S)).has_sites_of(Layout((C, B, S))) and not Layout((B, C, S)).has_sites_of(Layout((B, S, C)))
