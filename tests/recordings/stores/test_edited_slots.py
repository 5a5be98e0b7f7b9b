"""The copy-on-write view: what it shares, what it holds, whom it tells of the next call."""

from __future__ import annotations

import copy
import pickle
import threading
import weakref
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from fisedit_compiler.recordings.stores.edited import EditedSlots, written_in
from fisedit_compiler.recordings.stores.memory import MemorySlots
from fisedit_compiler.slots.row_form import RowForm
from fisedit_compiler.slots.turn import Turn
from fisedit_compiler.slots.written import Written, WrittenRows
from tests.support.noting_slots import NotingSlots
from tests.support.runs import together

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


def test_what_is_made_later_is_made_once_and_keeps_nothing_of_how() -> None:
    recorded, made = base(), list[int]()
    first = written(recorded, turn(0), 1.0)
    covered = weakref.ref(written_in(first)["canvas"].by_turn[0].rows)

    def make(first: EditedSlots = first) -> EditedSlots:
        made.append(1)
        return written(first, turn(0, 2), 2.0)

    view = EditedSlots.later(make, 2 * 2 * 4)
    del first, make
    assert view.own_nbytes == 2 * 2 * 4 and not made and covered() is not None
    view.settle()
    assert covered() is None, "rows that are written over are nobody's"
    assert list(view) == ["canvas", "statistics"] and len(view) == 2 and "canvas" in view
    assert view.read("canvas")[0, :, 0].tolist() == [2.0, 0.0, 2.0, 0.0]
    assert view.own_nbytes == sum(tensor.nbytes for tensor in view.own)
    again = written(view, turn(1), 3.0)
    assert again.read("canvas")[0, :, 0].tolist() == [2.0, 3.0, 2.0, 0.0] and made == [1]


@pytest.mark.parametrize("copied", [lambda view: pickle.loads(pickle.dumps(view)), copy.deepcopy, copy.copy])
def test_a_copy_has_the_slots_and_nothing_of_how_they_are_made(copied: Callable[[EditedSlots], EditedSlots]) -> None:
    view = EditedSlots.later(lambda: written(base(), turn(0), 1.0), 8)
    other = copied(view)
    del view
    assert other._make is None
    assert other.read("canvas")[0, :, 0].tolist() == [1.0, 0.0, 0.0, 0.0] and other.own_nbytes == 8


@pytest.mark.parametrize("ask", [
    lambda view: view.read("canvas"), lambda view: list(view), lambda view: "canvas" in view, lambda view: view.nbytes,
    lambda view: list(view.tensors()), lambda view: view.only(["canvas"]), lambda view: written_in(view),
    lambda view: view.addresses({"canvas": (8, 2, 1)}, torch.device("cpu")), lambda view: written(view, turn(1), 1.0),
    lambda view: view.with_earlier(written(base(), turn(1), 1.0), ["canvas"]), lambda view: view.prefetch(0),
])  # fmt: skip
def test_whatever_is_asked_of_it_first(ask: Callable[[EditedSlots], Any]) -> None:
    view = EditedSlots.later(lambda: written(base(), turn(0), 1.0), 8)
    ask(view)
    assert view.read("canvas")[0, :, 0].tolist() == [1.0, 0.0, 0.0, 0.0]


def test_what_shares_a_piece_of_memory_is_pickled_and_copied_once() -> None:
    """As what one call on a GPU wrote does: pickle would write the whole piece for every slot."""
    names = [f"slot{number}" for number in range(50)]
    recorded = MemorySlots({name: torch.zeros(1, 40, 2) for name in names})
    piece, where = torch.randn(50, 1, 30, 2), turn(*range(30))
    changes = {name: Written(FORM, (WrittenRows(where, rows),)) for name, rows in zip(names, piece, strict=True)}
    view = EditedSlots.later(lambda: EditedSlots(recorded, {**changes, "slot0": piece.new_ones(2, 1, 40, 2)[0]}), 0)
    packed = pickle.dumps(view)
    assert len(packed) < 2 * view.nbytes + 50_000
    for other in (pickle.loads(packed), copy.deepcopy(view)):
        assert all(torch.equal(other.read(name), view.read(name)) for name in names)
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in other.own)
        assert len(other.own) == 50 and other.written["slot1"] is other._contents.written["slot1"]
        again = written_in(other)["slot1"].after(WrittenRows(turn(39), rows(5.0, 1)))
        assert EditedSlots(other, {"slot1": again}).read("slot1")[0, 39].tolist() == [5.0, 5.0]
    assert (
        view.read("slot1").data_ptr() != 0 and view.written["slot1"].by_turn[0].rows.data_ptr() == piece[1].data_ptr()
    )


def test_threads_may_ask_at_once() -> None:
    gate = threading.Barrier(2, timeout=20)

    def make() -> EditedSlots:
        gate.wait()  # both are making it
        return written(base(), turn(0), 1.0)

    view = EditedSlots.later(make, 8)
    found = together([lambda: view.read("canvas")[0, :, 0].tolist() for _ in range(2)])
    assert found == [[1.0, 0.0, 0.0, 0.0]] * 2


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
