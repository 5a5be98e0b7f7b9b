"""``edit(..., copies=P)``: several edits of one recording in one batch, with one mask or one each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from fisedit_compiler import Recording, SparseModule, SparsifyConfig, sparsify
from fisedit_compiler.errors import ConfigError, FiseditError, MaskError, RecordingError
from fisedit_compiler.kernels.tolerances import assert_close
from fisedit_compiler.masks import grown
from fisedit_compiler.recordings.stores.edited import EditedSlots
from fisedit_compiler.recordings.stores.repeated import RepeatedSlots
from fisedit_compiler.runtime.sessions.edit_masks import EditMasks
from fisedit_compiler.runtime.sessions.edit_session import EditSession
from tests.reference.pinned import PinnedRun
from tests.support.compiled import HEIGHT, WIDTH, box, model_and_compiled
from tests.support.compiled_zoo import active_sets
from tests.support.zoo import ZOO, Inputs

COPIES = 3
BATCH = 2
ONE = box(4, 6, 12, 16)
EACH = torch.stack([ONE, box(2, 12, 9, 20), box(0, 0, 5, 5)])


@cache
def base(norm: Any = "recorded") -> tuple[SparseModule, Inputs, Tensor, Recording]:
    """A compiled model and one recorded call of two samples."""
    model, compiled = model_and_compiled("sd15", norm=norm)
    inputs = model.make_inputs(BATCH, HEIGHT, WIDTH)
    with compiled.record() as recording:
        output = compiled(**inputs)[0]
    return compiled, inputs, output, recording


def edits_of(inputs: Inputs, masks: Sequence[Tensor]) -> list[Inputs]:
    """An edit of its own for each copy."""
    return [ZOO["sd15"]().edit_inputs(inputs, mask, seed=number + 1) for number, mask in enumerate(masks)]


def together(edits: Sequence[Inputs]) -> Inputs:
    """The calls of all copies as one, every sample's copies side by side."""
    names = [name for name, value in edits[0].items() if isinstance(value, Tensor) and value.dim() > 0]
    joined = {name: torch.stack([edit[name] for edit in edits], dim=1).flatten(0, 1) for name in names}
    return {**edits[0], **joined}


def run(
    compiled: SparseModule, recording: Recording, inputs: Inputs, mask: Any, copies: int = COPIES, record: bool = True
) -> tuple[list[Tensor], EditSession]:
    with compiled.edit(recording, mask, record=record, copies=copies) as session:
        output = compiled(**inputs)[0]
    return list(output.unflatten(0, (-1, copies)).unbind(1)), session


# -- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["recorded", "incremental"])
def test_copies_with_one_mask_are_the_edits_one_by_one(norm: Any) -> None:
    compiled, inputs, output, recording = base(norm)
    edits = edits_of(inputs, [ONE] * COPIES)
    outputs, session = run(compiled, recording, together(edits), ONE)
    assert session.result is None and len(session.results) == COPIES
    for edit, result, kept in zip(edits, outputs, session.results, strict=True):
        (alone,), single = run(compiled, recording, edit, ONE, copies=1)
        assert_close(result, alone, torch.float32)
        assert torch.equal(result[..., ~ONE], output[..., ~ONE])
        assert single.result is not None and kept.complete
        assert kept.own_nbytes == single.result.own_nbytes
        for name, value in single.result.calls[0].slots.items():
            assert_close(kept.slot(0, name), value, torch.float32)


@pytest.mark.parametrize("norm", ["recorded", "incremental"])
def test_copies_with_masks_of_their_own_are_the_pinned_program_of_the_union(norm: Any) -> None:
    compiled, inputs, output, recording = base(norm)
    edits = edits_of(inputs, list(EACH))
    outputs, session = run(compiled, recording, together(edits), EACH)
    oracle = PinnedRun(compiled.original, inputs)
    active = active_sets(session)
    assert torch.equal(active[HEIGHT, WIDTH], EACH.any(dim=0))
    for edit, mask, result, kept in zip(edits, EACH, outputs, session.results, strict=True):
        expected = torch.where(mask, oracle.replay(edit, active, norm=norm), output)
        assert_close(result, expected, torch.float32)
        assert torch.equal(result[..., ~mask], output[..., ~mask]), "outside its own mask stands the recording"
        assert not torch.equal(result, output)
        (slot,) = (spec.slot for spec in compiled.programs[0].outputs)
        assert slot is not None and torch.equal(kept.slot(0, slot), result)


@pytest.mark.parametrize("norm", ["recorded", "incremental"])
def test_every_copy_can_be_edited_further(norm: Any) -> None:
    """A recording of a copy has the recorded batch, its own rows, and shares the rest with the base."""
    compiled, inputs, _, recording = base(norm)
    edits = edits_of(inputs, list(EACH))
    outputs, session = run(compiled, recording, together(edits), EACH)
    oracle, active = PinnedRun(compiled.original, inputs), active_sets(session)
    for edit, mask, result, kept in zip(edits, EACH, outputs, session.results, strict=True):
        assert kept.calls[0].batch == BATCH
        slots = kept.calls[0].slots
        assert isinstance(slots, EditedSlots)
        held = {id(tensor) for tensor in slots.tensors()}
        assert all(id(recording.calls[0].slots[name]) in held for name in slots.written)
        for tensor in slots.own:
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, "a copy's rows keep the other copies' alive"
        (again,), _ = run(compiled, kept, edit, mask, copies=1)
        assert_close(again, result, torch.float32)
        other = box(6, 8, 14, 18)
        further = ZOO["sd15"]().edit_inputs(edit, other, seed=30)
        (second,), step = run(compiled, kept, further, other, copies=1)
        assert torch.equal(second[..., ~other], result[..., ~other])
        turn = oracle.continued(edit, active, norm=norm)
        expected = turn.replay(further, active_sets(step), norm=norm)
        assert_close(second[..., other], expected[..., other], torch.float32)


def test_copies_of_copies() -> None:
    compiled, inputs, _, recording = base()
    edits = edits_of(inputs, [ONE] * 2)
    _, session = run(compiled, recording, together(edits), ONE, copies=2)
    further = edits_of(edits[1], [EACH[1]] * 2)
    outputs, _ = run(compiled, session.results[1], together(further), EACH[1], copies=2)
    for edit, result in zip(further, outputs, strict=True):
        (alone,), _ = run(compiled, session.results[1], edit, EACH[1], copies=1)
        assert_close(result, alone, torch.float32)


def test_slots_are_repeated_when_they_are_read() -> None:
    compiled, _, _, recording = base("incremental")
    (executable,) = compiled._programs.executables()
    slots = recording.calls[0].slots
    repeated = RepeatedSlots(slots, BATCH, COPIES, lambda: executable.batch_axes[0])
    assert list(repeated) == list(slots) and len(repeated) == len(slots)
    for name, value in slots.items():
        assert torch.equal(repeated[name], value.repeat_interleave(COPIES, 0))


def test_all_copies_share_a_program() -> None:
    compiled, inputs, _, recording = base()
    programs = len(compiled.programs)
    for copies in (1, 2, 4):
        edits = edits_of(inputs, [ONE] * copies)
        run(compiled, recording, together(edits), ONE, copies=copies, record=False)
    assert len(compiled.programs) == programs == 1


def test_measured_times_are_those_of_calls_of_all_copies() -> None:
    compiled, inputs, _, recording = base()
    _, session = run(compiled, recording, together(edits_of(inputs, [ONE] * COPIES)), ONE)
    (sparse,) = session.measured()
    assert (sparse.kind, sparse.calls, sparse.batch) == ("sparse", 1, BATCH * COPIES)


# -- empty masks, dense calls ----------------------------------------------------------------------------------------


def test_copies_without_a_mask_run_densely_until_one_is_set() -> None:
    compiled, inputs, _, recording = base()
    edits = edits_of(inputs, [torch.zeros_like(ONE)] * 2)
    outputs, session = run(compiled, recording, together(edits), None, copies=2)
    assert [kind for kind, _ in session.timings] == ["dense"]
    for edit, result, kept in zip(edits, outputs, session.results, strict=True):
        assert_close(result, compiled.original(**edit)[0], torch.float32)
        (slot,) = (spec.slot for spec in compiled.programs[0].outputs)
        assert slot is not None and torch.equal(kept.slot(0, slot), result)


def test_copies_with_an_empty_mask_return_the_recording() -> None:
    compiled, inputs, output, recording = base()
    masks = EACH.clone()
    masks[1] = False
    edits = edits_of(inputs, list(masks))
    outputs, session = run(compiled, recording, together(edits), list(masks))
    assert torch.equal(outputs[1], output) and not torch.equal(outputs[0], output)
    nothing = edits_of(inputs, [torch.zeros_like(ONE)] * COPIES)
    outputs, session = run(compiled, recording, together(nothing), torch.zeros_like(EACH))
    assert [kind for kind, _ in session.timings] == ["skipped"]
    assert all(torch.equal(result, output) for result in outputs)
    assert [kept.own_nbytes for kept in session.results] == [0] * COPIES


@pytest.mark.parametrize("record", [False, True])
def test_above_the_break_even_each_copy_is_the_dense_run_inside_its_own_mask(record: bool) -> None:
    compiled, inputs, output, recording = base()
    fallback = sparsify(compiled.original, SparsifyConfig(dense_above=0.1))
    edits = edits_of(inputs, list(EACH))
    outputs, session = run(fallback, recording, together(edits), EACH, record=record)
    assert session.fallback is not None and [kind for kind, _ in session.timings] == ["dense"]
    for number, (edit, mask, result) in enumerate(zip(edits, EACH, outputs, strict=True)):
        dense = compiled.original(**edit)[0]
        assert_close(result, torch.where(mask, dense, output), torch.float32)
        assert torch.equal(result[..., ~mask], output[..., ~mask])
        if record:
            (slot,) = (spec.slot for spec in compiled.programs[0].outputs)
            assert slot is not None and torch.equal(session.results[number].slot(0, slot), result)


def test_a_reason_to_run_densely_counts_whatever_the_area() -> None:
    compiled, inputs, output, recording = base()
    edits = edits_of(inputs, [ONE] * 2)
    with compiled.edit(recording, copies=2) as session:
        session.set_mask(ONE, densely="because")
        result = compiled(**together(edits))[0]
    assert session.fallback == "because" and session.timings[0][0] == "dense"
    expected = compiled.original(**together(edits))[0]
    assert torch.equal(result, torch.where(ONE, expected, output.repeat_interleave(2, 0)))


# -- mistakes --------------------------------------------------------------------------------------------------------


def test_inputs_are_checked_outside_each_own_mask() -> None:
    compiled, inputs, _, recording = base()
    edits = edits_of(inputs, list(EACH))
    swapped = [edits[1], edits[0], edits[2]]
    with pytest.raises(RecordingError, match="differs from the recorded one outside the mask"):
        run(compiled, recording, together(swapped), EACH)
    run(compiled, recording, together(swapped), EACH.any(dim=0))


MISTAKES: dict[str, tuple[Any, int, type[FiseditError], str]] = {
    "masks": (
        EACH[:2],
        3,
        MaskError,
        "2 masks were given for 3 copies of the recording; pass one",
    ),
    "list": ([ONE], 3, MaskError, "1 masks were given for 3 copies"),
    "size": ([ONE, ONE, ONE[:5]], 3, MaskError, "resize the mask"),
    "one copy": (EACH, 1, MaskError, "one mask serves the whole batch"),
    "zero": (ONE, 0, ConfigError, "copies=0: it is the number of edits made at once"),
    "bool": (ONE, True, ConfigError, "copies=True"),
    "text": (ONE, "2", ConfigError, "copies='2'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_wrong_masks_and_copies(name: str) -> None:
    compiled, inputs, output, recording = base()
    mask, copies, error, message = MISTAKES[name]
    with pytest.raises(error, match=message), compiled.edit(recording, mask, copies=copies):
        pytest.fail("arguments are checked before anything runs")
    assert torch.equal(compiled(**inputs)[0], output), "the module is in no mode"


def test_another_batch_is_named() -> None:
    compiled, inputs, _, recording = base()
    edits = edits_of(inputs, [ONE] * 2)
    with pytest.raises(RecordingError, match="has batch 4, not 6, the recorded 2 times copies=3"):
        run(compiled, recording, together(edits), ONE, copies=3)


def test_another_timestep_is_named() -> None:
    compiled, inputs, _, recording = base()
    call = {**together(edits_of(inputs, [ONE] * 2)), "timestep": torch.tensor(1)}
    with pytest.raises(RecordingError, match=r"timestep 1\.0, the recording at"):
        run(compiled, recording, call, ONE, copies=2)


def test_masks_of_every_form() -> None:
    size = (HEIGHT, WIDTH)
    for given in (EACH, EACH[:, None], list(EACH), tuple(mask.numpy() for mask in EACH), EACH.numpy()):
        read = EditMasks.of(given, 3, *size, 1)
        assert read.each is not None and torch.equal(read.each, EACH) and torch.equal(read.sites, EACH.any(dim=0))
        assert torch.equal(read.each_grown, torch.stack([grown(mask, 1) for mask in EACH]))
        assert torch.equal(read.grown, grown(EACH.any(dim=0), 1))
        assert EditMasks.of(read, 3, *size, 1) is read
        with pytest.raises(MaskError, match="3 masks were given for 2 copies"):
            EditMasks.of(read, 2, *size, 1)
    for given in (ONE, ONE[None], ONE[None, None], [ONE] * 3, ONE.expand(3, *size)):
        read = EditMasks.of(given, 3, *size, 1)
        assert read.each is None and torch.equal(read.sites, ONE) and torch.equal(read.each_grown[0], grown(ONE, 1))
    assert torch.equal(EditMasks.of([ONE], 1, *size, 0).sites, ONE)
