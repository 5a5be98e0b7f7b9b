"""A run tells the stores of a recording which call comes next: each once, before it is read, however calls run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fisedit_compiler import Recording, SparsifyConfig, sparsify
from fisedit_compiler.errors import RecordingError
from tests.support.compiled import HEIGHT, STEPS, WIDTH, Run, box, denoise, guided, other_text, recorded
from tests.support.noting_slots import Note, noting

MASK = box(4, 6, 11, 15)
EVERY_CALL = [("announced", call) for call in range(STEPS)]


@pytest.fixture(scope="module")
def run() -> Run:
    return recorded(batch=1)


def sparse(run: Run, recording: Recording) -> None:
    with run.compiled.edit(recording, MASK) as session:
        denoise(run.compiled, other_text(run.inputs))
    assert {kind for kind, _ in session.timings} == {"sparse"}


def recorded_again(run: Run, recording: Recording) -> None:
    with run.compiled.edit(recording, MASK, record=True):
        denoise(run.compiled, other_text(run.inputs))


def dense(run: Run, recording: Recording) -> None:
    with run.compiled.edit(recording, record=True) as session:
        denoise(run.compiled, other_text(run.inputs))
    assert {kind for kind, _ in session.timings} == {"dense"}


def skipped(run: Run, recording: Recording) -> None:
    with run.compiled.edit(recording) as session:
        denoise(run.compiled, run.inputs)
    assert {kind for kind, _ in session.timings} == {"skipped"}


def empty_mask(run: Run, recording: Recording) -> None:
    with run.compiled.edit(recording, torch.zeros_like(MASK)) as session:
        denoise(run.compiled, other_text(run.inputs))
    assert {kind for kind, _ in session.timings} == {"skipped"}


def above_the_break_even(run: Run, recording: Recording) -> None:
    fallback = sparsify(run.compiled.original, SparsifyConfig(dense_above=0.01))
    with fallback.edit(recording, MASK) as session:
        denoise(fallback, other_text(run.inputs))
    assert session.fallback is not None


def copies(run: Run, recording: Recording) -> None:
    inputs = other_text(run.inputs)
    inputs |= {name: inputs[name].repeat_interleave(2, 0) for name in ("sample", "encoder_hidden_states")}
    with run.compiled.edit(recording, MASK, copies=2) as session:
        denoise(run.compiled, inputs)
    assert {kind for kind, _ in session.timings} == {"sparse"}


def a_mask_from_the_second_call_on(run: Run, recording: Recording) -> None:
    with run.compiled.edit(recording) as session:

        def module(**call: Any) -> Any:
            if session.call == 1:
                session.set_mask(torch.ones_like(MASK))
            return run.compiled(**call)

        denoise(module, other_text(run.inputs))
    assert [kind for kind, _ in session.timings] == ["dense", "sparse", "sparse"]


def a_call_that_was_refused_and_made_again(run: Run, recording: Recording) -> None:
    with run.compiled.edit(recording, MASK):

        def module(**call: Any) -> Any:
            with pytest.raises(RecordingError):
                run.compiled(**{**call, "sample": call["sample"][..., :-8]})
            return run.compiled(**call)

        denoise(module, other_text(run.inputs))


WAYS: tuple[Callable[[Run, Recording], None], ...] = (
    sparse,
    recorded_again,
    dense,
    skipped,
    empty_mask,
    above_the_break_even,
    copies,
    a_mask_from_the_second_call_on,
    a_call_that_was_refused_and_made_again,
)


def announced(notes: list[Note]) -> list[Note]:
    return [note for note in notes if note[0] == "announced"]


@pytest.mark.parametrize("make", WAYS, ids=lambda make: make.__name__)
def test_every_call_is_announced_once_and_before_it_is_read(run: Run, make: Callable[[Run, Recording], None]) -> None:
    recording, notes = noting(run.recording)
    make(run, recording)
    assert announced(notes) == EVERY_CALL
    read = [call for what, call in notes if what == "read"]
    assert set(read) == set(range(STEPS)), "the subject is a run that reads"
    for call in range(STEPS):
        assert notes.index(("announced", call)) < notes.index(("read", call))


def test_the_next_call_is_announced_before_anything_of_this_one_is_read(run: Run) -> None:
    """So that a store can bring it while this one is computed."""
    recording, notes = noting(run.recording)
    sparse(run, recording)
    for call in range(STEPS - 1):
        assert notes.index(("announced", call + 1)) < notes.index(("read", call))


def test_a_run_that_begins_announces_its_first_call() -> None:
    """Before the text is encoded; columns of its maps may be asked for before it is made, too."""
    run = recorded(maps=1)
    recording, notes = noting(run.recording)
    with run.compiled.edit(recording) as session:
        assert notes == EVERY_CALL[:1]
        session.reuse_maps(torch.full((run.inputs["encoder_hidden_states"].shape[1],), -1))
        guided(run.compiled, other_text(run.inputs))
    assert announced(notes) == EVERY_CALL


def test_every_run_of_a_recording_announces_its_calls(run: Run) -> None:
    recording, notes = noting(run.recording)
    sparse(run, recording)
    sparse(run, recording)
    assert announced(notes) == 2 * EVERY_CALL


def test_an_edit_of_an_edit_announces_to_the_store_of_the_recorded_run(run: Run) -> None:
    recording, notes = noting(run.recording)
    with run.compiled.edit(recording, MASK, record=True) as session:
        denoise(run.compiled, other_text(run.inputs))
    assert session.result is not None
    notes.clear()
    with run.compiled.edit(session.result, box(0, 0, HEIGHT, WIDTH // 2)):
        denoise(run.compiled, other_text(run.inputs))
    assert announced(notes) == EVERY_CALL
