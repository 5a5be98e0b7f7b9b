"""From what an edited call computed to its slots: what the recording of an edit keeps, and what it shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fisedit_compiler.lowering.program import CompiledProgram
from fisedit_compiler.passes.programs.reuse import Cut
from fisedit_compiler.recordings.stores import SlotStore
from fisedit_compiler.recordings.stores.edited import Change, EditedSlots, written_in
from fisedit_compiler.slots.base import SlotKind
from fisedit_compiler.slots.site_sums import SiteSums
from fisedit_compiler.slots.turn import Edit, Turn
from fisedit_compiler.tensors.late import nbytes_of

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def after_sparse_call(
    program: CompiledProgram,
    base: SlotStore,
    turn: Turn,
    updates: Mapping[str, Tensor],
    earlier: SlotStore | None = None,
) -> SlotStore:
    """The slots of a sparse call. What it changed is written down later, unless a kind of another package has to be
    asked, which may refuse.

    Args:
        program: says what each update is.
        base: slots of the call that was edited.
        turn: the sites that rows belong to.
        updates: what the update graph returned, by slot; kept as they are.
        earlier: of a shallow call, the slots of the full call that it took values from. Those of coarser levels are
            shared with it as a whole: they belong together, and to what was computed from them.
    """
    if earlier is not None:
        assert isinstance(earlier, EditedSlots)  # as this function returned it

    def make() -> EditedSlots:
        return _written_down(program, base, turn, updates, earlier)

    return EditedSlots.later(make, nbytes_of(updates)) if _asks_nobody(program) else make()


def _asks_nobody(program: CompiledProgram) -> bool:
    """Whether no kind of slots has a way of its own to write rows, but for those of this package."""
    return all(type(slot.kind).written in _OWN_WAYS for slot in program.slots)


_OWN_WAYS = (SlotKind.written, SiteSums.written)


def _written_down(
    program: CompiledProgram,
    base: SlotStore,
    turn: Turn,
    updates: Mapping[str, Tensor],
    earlier: EditedSlots | None,
) -> EditedSlots:
    slots, known = {slot.name: slot for slot in program.slots}, written_in(base)
    changes: dict[str, Change] = {}
    edit = Edit(turn, base, updates)
    for update in program.updates if earlier is None else program.reuse.updates:
        slot = slots[update.slot]
        if update.dim is None:
            changes[slot.name] = updates[slot.name]
        else:
            changes[slot.name] = slot.written(known.get(slot.name), edit)
    edited = EditedSlots(base, changes, slots)
    if earlier is None:
        return edited
    assert isinstance(program.cut, Cut)
    return edited.with_earlier(earlier, program.cut.deep)


def pinned_updates(program: CompiledProgram, turn: Turn, outputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """The rows of the slots that hold outputs, of outputs that were set back after the step."""
    slots = {slot.name: slot for slot in program.slots}
    updated = {update.slot for update in program.updates}
    rows = {}
    for output, value in zip(program.outputs, outputs, strict=True):
        if output.slot is not None and output.slot in updated:
            form = slots[output.slot].row_form()
            rows[output.slot] = form.gather(value, turn.sites[form.level])
    return rows


def after_dense_call(program: CompiledProgram, base: SlotStore, recorded: Mapping[str, Tensor]) -> SlotStore:
    """The slots of a dense call inside an edit: whole tensors, except for those whose bits are the base's.

    Args:
        program: whose slots they are.
        base: slots of the call that was edited.
        recorded: all slots of the dense call; those that are kept are kept as they are.
    """
    names = [name for name, value in recorded.items() if value.numel() and name in base]
    flags = [_same_bits(recorded[name], base[name]) for name in names]
    # One transfer for all of them: on a GPU each answer by itself would be waited for.
    same = dict(zip(names, torch.stack(flags).tolist(), strict=True)) if flags else {}
    for slot in program.slots:
        if slot.of:
            # What the base has of it is only right together with what the base has of the other slot.
            same[slot.name] = same.get(slot.name, True) and same.get(slot.of, True)
    changes: dict[str, Change] = {
        name: value for name, value in recorded.items() if name not in base or not same.get(name, True)
    }
    return EditedSlots(base, changes, recorded)


def unchanged(base: SlotStore, names: Sequence[str] | None = None) -> SlotStore:
    """The slots of a call that an edit answered from its recording: all of them (or those named) the base's."""
    return EditedSlots(base, {}, names)


def _same_bits(first: Tensor, second: Tensor) -> Tensor:
    if first.shape != second.shape or first.dtype != second.dtype:
        return torch.tensor(False, device=first.device)
    bits = _BITS[first.element_size()]
    return (first.view(bits) == second.view(bits)).all()
