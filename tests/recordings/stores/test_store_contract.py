"""What every store of slots promises, for each store there is. A new one joins by a line in ``STORES``."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from fisedit_compiler.errors import RecordingError
from fisedit_compiler.kernels.addresses import ALIGNMENT, tensor_at
from fisedit_compiler.recordings.stores.edited import EditedSlots
from fisedit_compiler.recordings.stores.joined import JoinedSlots
from fisedit_compiler.recordings.stores.memory import MemorySlots
from fisedit_compiler.recordings.stores.repeated import RepeatedSlots
from fisedit_compiler.recordings.stores.store import SlotStore
from fisedit_compiler.slots.row_form import RowForm
from fisedit_compiler.slots.turn import Turn
from fisedit_compiler.slots.written import Written, WrittenRows

Values = dict[str, Tensor]
CPU = torch.device("cpu")


def values() -> Values:
    """Slots as a call may have them: packed, channels last, small, misaligned, of a byte, empty."""
    random = torch.Generator().manual_seed(0)
    return {
        "canvas": torch.randn(2, 6, 4, generator=random),
        "map": torch.randn(2, 3, 4, 5, generator=random).contiguous(memory_format=torch.channels_last),
        "statistics": torch.randn(2, 2, 2, generator=random),
        "misaligned": torch.randn(2, 3, generator=random).half().flatten()[1:5].view(2, 2),
        "bytes": torch.randint(0, 255, (2, 3), generator=random).to(torch.uint8)[:, :1],
        "empty": torch.empty(2, 0),
    }


def edited(slots: Values) -> SlotStore:
    """A view of another call, in which an edit wrote rows of one slot and two edits wrote another one whole."""
    form, turn = RowForm(Fraction(1), 1), Turn({Fraction(1): torch.tensor([0, 2, 5])})
    rows = slots["canvas"][:, [0, 2, 5]]
    root = slots["canvas"].index_fill(1, torch.tensor([0, 2, 5]), 7.0)
    base = MemorySlots({**slots, "canvas": root, "statistics": torch.zeros(2, 2, 2)})
    once = EditedSlots(base, {"statistics": torch.ones(2, 2, 2)})
    written = Written(form, (WrittenRows(turn, rows),))
    return EditedSlots(once, {"canvas": written, "statistics": slots["statistics"]})


def view(slots: Values) -> SlotStore:
    """A view of a call of which an edit changed nothing."""
    return EditedSlots(MemorySlots(slots), {})


def repeated(slots: Values) -> SlotStore:
    """The call as a single edit of it reads it through a view that repeats samples."""
    return RepeatedSlots(MemorySlots(slots), 2, 1, lambda: {"statistics": None})


def joined(slots: Values) -> SlotStore:
    """The call as two stores hold it, one of them such a view itself."""
    names = list(slots)
    parts = JoinedSlots.of(MemorySlots({name: slots[name] for name in names[::2]}))
    others = edited(slots).only(names[1::2])
    return JoinedSlots.of(parts, others).only(names)


STORES: dict[str, Callable[[Values], SlotStore]] = {
    "memory": MemorySlots,
    "edited": edited,
    "unchanged": view,
    "repeated": repeated,
    "joined": joined,
}
"""Every kind of store: what makes one that gives the slots it is given."""


@pytest.fixture(params=list(STORES))
def store(request: pytest.FixtureRequest) -> SlotStore:
    return STORES[request.param](values())


def same(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


def layout_of(slots: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: value.stride() for name, value in slots.items()}


# -- reading ---------------------------------------------------------------------------------------------------------


def test_a_slot_is_read_bit_for_bit(store: SlotStore) -> None:
    for name, value in values().items():
        assert same(store.read(name), value) and same(store[name], value), name
        assert store.read(name).device == value.device


def test_it_is_a_mapping_in_the_order_of_the_slots(store: SlotStore) -> None:
    assert list(store) == list(values()) and len(store) == len(values())
    assert "canvas" in store and "elsewhere" not in store
    assert all(same(value, values()[name]) for name, value in store.items())


def test_a_slot_that_is_not_there_is_named(store: SlotStore) -> None:
    for ask in (
        lambda: store.read("elsewhere"),
        lambda: store.only(["canvas", "elsewhere"]),
        lambda: store.addresses({"elsewhere": (1,)}, CPU),
    ):
        with pytest.raises(RecordingError, match=r"no slot 'elsewhere'; it has \d slots"):
            ask()
    with pytest.raises(KeyError):
        store["elsewhere"]
    assert store.get("elsewhere") is None


def test_what_was_read_outlives_the_store() -> None:
    for make in STORES.values():
        store = make(values())
        read = {name: store.read(name) for name in store}
        del store
        assert all(same(value, values()[name]) for name, value in read.items())


def test_an_announcement_changes_nothing(store: SlotStore) -> None:
    for call in (0, 1, 1, 5):
        store.prefetch(call)
    assert all(same(store.read(name), value) for name, value in values().items())


# -- addresses -------------------------------------------------------------------------------------------------------


def test_at_every_address_lies_what_is_read(store: SlotStore) -> None:
    slots = {name: value for name, value in values().items() if value.numel()}
    addresses = store.addresses(layout_of(slots), CPU)
    assert addresses.table.dtype == torch.int64 and list(addresses.tensors) == list(slots)
    for (name, value), address in zip(slots.items(), addresses.table.tolist(), strict=True):
        assert address % ALIGNMENT == 0 or value.nbytes % 2, name
        assert same(tensor_at(address, value), store.read(name)), name


def test_slots_lie_as_the_layout_says(store: SlotStore) -> None:
    """Recordings of one shape are read with the strides of one of them."""
    other = {"canvas": (24, 1, 6), "map": (60, 20, 5, 1)}
    addresses = store.addresses(other, CPU)
    for (name, strides), address in zip(other.items(), addresses.table.tolist(), strict=True):
        like = torch.empty_strided(values()[name].shape, strides)
        assert same(tensor_at(address, like), store.read(name)), name


def test_the_same_table_means_the_same_memory(store: SlotStore) -> None:
    """A reader copies a table to its place only if it is another one than last time."""
    layout = layout_of(values())
    first = store.addresses(layout, CPU)
    second = store.addresses(layout, CPU)
    if second.table is first.table:
        assert all(second.tensors[name] is value for name, value in first.tensors.items())
    else:
        assert all(same(second.tensors[name], value) for name, value in first.tensors.items())


def test_addresses_hold_what_they_point_to() -> None:
    layout = {"canvas": (24, 1, 6)}
    for make in STORES.values():
        addresses = make(values()).addresses(layout, CPU)
        like = torch.empty_strided((2, 6, 4), layout["canvas"])
        assert same(tensor_at(int(addresses.table[0]), like), values()["canvas"])


# -- memory ----------------------------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_tensors_it_keeps(store: SlotStore) -> None:
    kept = {id(tensor): tensor.nbytes for tensor in store.tensors()}
    assert store.nbytes == sum(kept.values())
    assert 0 <= store.own_nbytes <= store.nbytes


def test_reading_adds_no_bytes(store: SlotStore) -> None:
    before = store.nbytes
    read = {name: store.read(name) for name in store}
    assert read and store.nbytes == before


def test_dropping_a_store_frees_its_tensors() -> None:
    for name, make in STORES.items():
        store = make(values())
        kept = [weakref.ref(tensor) for tensor in store.tensors()]
        del store
        assert kept and not [tensor for tensor in kept if tensor() is not None], name


def test_a_part_of_a_store_keeps_nothing_else_alive() -> None:
    for name, make in STORES.items():
        store = make(values())
        before = [weakref.ref(tensor) for tensor in store.tensors()]
        part = store.only(["map", "canvas"])
        del store
        assert list(part) == ["map", "canvas"] and "statistics" not in part
        assert all(same(part.read(slot), values()[slot]) for slot in part)
        kept = {id(tensor) for tensor in part.tensors()}
        assert not [ref for ref in before if ref() is not None and id(ref()) not in kept], name
        with pytest.raises(RecordingError, match="no slot 'statistics'; it has 2 slots"):
            part.read("statistics")


# -- edits of it -----------------------------------------------------------------------------------------------------


def test_an_edit_of_it_is_a_view_that_shares_the_rest(store: SlotStore) -> None:
    changed = torch.randn(2, 2, 2)
    edit = EditedSlots(store, {"statistics": changed})
    assert edit.read("statistics") is changed and edit.own_nbytes == changed.nbytes
    assert same(store.read("statistics"), values()["statistics"]), "what was edited stays as it is"
    assert all(same(edit.read(name), value) for name, value in values().items() if name != "statistics")
    assert edit.nbytes == sum({id(tensor): tensor.nbytes for tensor in edit.tensors()}.values())
