"""The copy-on-write view: what it shares, what it holds, whom it tells of the next call."""

from __future__ import annotations

import weakref
from fractions import Fraction

import torch
from torch import Tensor

from fisedit_compiler.recordings.stores.edited import EditedSlots, written_in
from fisedit_compiler.recordings.stores.memory import MemorySlots
from fisedit_compiler.slots.row_form import RowForm
from fisedit_compiler.slots.turn import Turn
from fisedit_compiler.slots.written import Written, WrittenRows
from tests.support.noting_slots import NotingSlots

FORM = RowForm(Fraction(1), 1)


def turn(*sites: int) -> Turn:
    return Turn({Fraction(1): torch.tensor(sites)})


def rows(value: float, count: int) -> Tensor:
    return torch.full((1, count, 2), value)


def base() -> MemorySlots:
    return MemorySlots({"canvas": torch.zeros(1, 4, 2), "statistics": torch.zeros(1, 2, 2)})


def written(slots: MemorySlots | EditedSlots, which: Turn, value: float) -> EditedSlots:
    """One more edit, which wrote rows of the canvas."""
    before = written_in(slots).get("canvas", Written(FORM, ()))
    count = len(which.sites[Fraction(1)])
    return EditedSlots(slots, {"canvas": before.after(WrittenRows(which, rows(value, count)))})


def test_later_rows_lie_over_earlier_ones() -> None:
    twice = written(written(base(), turn(0, 1), 1.0), turn(1, 3), 2.0)
    assert twice.read("canvas")[0, :, 0].tolist() == [1.0, 2.0, 0.0, 2.0]


def test_a_value_written_whole_hides_the_rows_under_it() -> None:
    whole = EditedSlots(written(base(), turn(0, 1), 1.0), {"canvas": torch.full((1, 4, 2), 5.0)})
    assert not written_in(whole) and bool((whole.read("canvas") == 5.0).all())
    over = written(whole, turn(2), 6.0)
    assert over.read("canvas")[0, :, 0].tolist() == [5.0, 5.0, 6.0, 5.0]


def test_its_own_bytes_are_what_the_last_edit_wrote() -> None:
    first = written(base(), turn(0, 1), 1.0)
    second = written(first, turn(2), 2.0)
    assert (first.own_nbytes, second.own_nbytes) == (2 * 2 * 4, 2 * 4)
    assert second.nbytes == base().nbytes + first.own_nbytes + second.own_nbytes
    assert EditedSlots(second, {}).own_nbytes == 0


def test_it_holds_tensors_and_no_other_view() -> None:
    recorded = base()
    first = written(recorded, turn(0), 1.0)
    second = EditedSlots(written(first, turn(2), 2.0), {"statistics": torch.ones(1, 2, 2)})
    dropped = [weakref.ref(recorded), weakref.ref(first), weakref.ref(recorded.read("statistics"))]
    canvas = weakref.ref(recorded.read("canvas"))
    del recorded, first
    assert [held() for held in dropped] == [None, None, None], "the statistics were replaced: nobody reads them"
    assert canvas() is not None and second.read("canvas")[0, :, 0].tolist() == [1.0, 0.0, 2.0, 0.0]


def test_a_table_of_addresses_is_kept_if_nothing_was_put_together_for_it() -> None:
    """So a call that an edit left alone is read like a recorded one, and rows are not kept as whole slots."""
    layout, cpu = {"canvas": (8, 2, 1)}, torch.device("cpu")
    for kept in (base(), EditedSlots(base(), {"statistics": torch.ones(1, 2, 2)})):
        assert kept.addresses(layout, cpu) is kept.addresses(layout, cpu)
        assert kept.addresses(dict(layout), cpu) is not kept.addresses(layout, cpu)
    once = written(base(), turn(0), 1.0)
    put_together = weakref.ref(once.addresses(layout, cpu).tensors["canvas"])
    assert put_together() is None


def test_the_store_of_the_recorded_call_is_told_of_the_next_call() -> None:
    noting = NotingSlots(base(), 3)
    second = EditedSlots(EditedSlots(noting, {}), {"statistics": torch.ones(1, 2, 2)})
    second.prefetch(3)
    assert noting.notes == [("announced", 3)]
