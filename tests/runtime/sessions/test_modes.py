"""Whose run a mode is: consumers of suspended generators are refused, calls made on somebody's behalf are not."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import warnings
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fisedit_compiler import Recording, SparseModule
from fisedit_compiler.errors import ModeError, RecordingError
from tests.support.modes import SAMPLE, refused

# -- modes that nobody enters ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["record", "edit"])
def test_a_mode_without_with_is_said(name: str, compiled: SparseModule) -> None:
    with compiled.record() as recording:
        compiled(SAMPLE)
    make = compiled.record if name == "record" else lambda: compiled.edit(recording, torch.ones(8, 8, dtype=torch.bool))
    words = rf"{name}\(\) does nothing until it is entered.*with compiled.{name}"
    make()  # and drop it
    with pytest.warns(RuntimeWarning, match=words):
        compiled(SAMPLE)
    mode = make()
    with pytest.warns(RuntimeWarning, match=words):
        assert torch.equal(compiled(SAMPLE), compiled.original(SAMPLE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(SAMPLE)  # said once
        with mode:
            compiled(SAMPLE)


def test_a_mode_in_the_place_of_its_recording_is_named(compiled: SparseModule) -> None:
    mode: Any = compiled.record()
    with pytest.raises(RecordingError, match=r"got record\(\) without `with ... as`"), compiled.edit(mode):
        pass
    with mode:
        compiled(SAMPLE)


# -- generators --------------------------------------------------------------------------------------


def recording_generator(compiled: SparseModule) -> Generator[Recording, None, None]:
    with compiled.record() as recording:
        compiled(SAMPLE)
        yield recording
        compiled(SAMPLE)


def test_the_consumer_of_a_suspended_generator_is_refused(compiled: SparseModule) -> None:
    generator = recording_generator(compiled)
    recording = next(generator)
    refused(lambda: compiled(SAMPLE), r"recording_generator\(\) at .*suspended.*contextlib\.contextmanager")
    assert next(generator, None) is None
    assert recording.complete and recording.num_calls == 2


def test_so_is_the_consumer_of_what_wraps_one(compiled: SparseModule) -> None:
    class Loader:
        """Advances a generator from a frame that has returned when the consumer calls."""

        def __init__(self) -> None:
            self.generator = recording_generator(compiled)

        def __iter__(self) -> Loader:
            return self

        def __next__(self) -> Recording:
            return next(self.generator)

    def delegating() -> Iterator[Recording]:
        yield from recording_generator(compiled)

    def in_a_stack() -> Iterator[Recording]:
        with contextlib.ExitStack() as stack:
            recording = stack.enter_context(compiled.record())
            compiled(SAMPLE)
            yield recording
            compiled(SAMPLE)

    for source in (Loader(), delegating(), in_a_stack(), torch.no_grad()(recording_generator)(compiled)):
        recordings = []
        for recording in source:
            recordings.append(recording)
            refused(lambda: compiled(SAMPLE))
        assert [(recording.complete, recording.num_calls) for recording in recordings] == [(True, 2)]


def test_a_generator_that_is_given_up_leaves_its_mode(compiled: SparseModule) -> None:
    generator = recording_generator(compiled)
    recording = next(generator)
    del generator
    assert torch.equal(compiled(SAMPLE), compiled.original(SAMPLE))
    assert not recording.complete and recording.num_calls == 1


def test_a_generator_advanced_inside_a_block_calls_for_it(compiled: SparseModule) -> None:
    def calls() -> Iterator[Tensor]:
        while True:
            yield compiled(SAMPLE)

    source = calls()
    with compiled.record() as recording:
        next(source), next(source)
    next(source)
    assert recording.num_calls == 2


# -- blocks entered on somebody's behalf --------------------------------------------------------------


@contextlib.contextmanager
def managed(compiled: SparseModule) -> Iterator[Recording]:
    with compiled.record() as recording:
        yield recording


class ByHand:
    """A class that enters a mode for its own block."""

    def __init__(self, compiled: SparseModule) -> None:
        self.mode = compiled.record()

    def __enter__(self) -> Recording:
        return self.mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.mode.__exit__(*error)


@contextlib.contextmanager
def in_a_stack(compiled: SparseModule) -> Iterator[Recording]:
    with contextlib.ExitStack() as stack:
        yield stack.enter_context(managed(compiled))


@contextlib.contextmanager
@torch.no_grad()
def decorated(compiled: SparseModule) -> Iterator[Recording]:
    yield from managed.__wrapped__(compiled)


@pytest.mark.parametrize("enter", [SparseModule.record, managed, ByHand, in_a_stack, decorated])
def test_a_context_manager_enters_for_its_block(compiled: SparseModule, enter: Callable[[SparseModule], Any]) -> None:
    with enter(compiled) as recording:
        compiled(SAMPLE)
        (lambda: compiled(SAMPLE))()
    assert recording.complete and recording.num_calls == 2

    def generator() -> Iterator[None]:
        with enter(compiled):
            yield

    for _ in generator():
        refused(lambda: compiled(SAMPLE))


def test_a_stack_kept_by_an_object(compiled: SparseModule) -> None:
    class Run:
        def start(self) -> None:
            self.stack = contextlib.ExitStack()
            self.recording = self.stack.enter_context(compiled.record())

    run = Run()
    run.start()
    compiled(SAMPLE)
    run.stack.close()
    assert run.recording.complete and run.recording.num_calls == 1


@pytest.fixture
def fixture_recording(compiled: SparseModule) -> Iterator[Recording]:
    with compiled.record() as recording:
        yield recording
    assert recording.complete and recording.num_calls == 2


def test_a_fixture_enters_for_its_test(compiled: SparseModule, fixture_recording: Recording) -> None:
    compiled(SAMPLE)

    async def call() -> None:
        compiled(SAMPLE)

    asyncio.run(call())


def test_a_mode_that_is_dropped_is_left(compiled: SparseModule) -> None:
    recording = compiled.record().__enter__()
    compiled(SAMPLE)
    assert recording.num_calls == 0


def test_each_run_takes_a_mode_of_its_own(compiled: SparseModule) -> None:
    mode = compiled.record()
    with mode, pytest.raises(ModeError, match="Call record\\(\\) again"):
        mode.__enter__()
    with pytest.raises(ModeError, match="Call record\\(\\) again"), mode:
        pass


# -- reset --------------------------------------------------------------------------------------------


def test_reset_leaves_a_mode_from_anywhere(compiled: SparseModule) -> None:
    stack = contextlib.ExitStack()
    recording = stack.enter_context(compiled.record())
    compiled(SAMPLE)
    thread = threading.Thread(target=compiled.reset)
    thread.start()
    thread.join()
    compiled(SAMPLE)
    assert recording.num_calls == 1
    with compiled.record() as other:
        compiled(SAMPLE)
        with pytest.raises(ModeError, match=r"left by reset\(\)"):
            stack.close()
        compiled(SAMPLE)
    assert not recording.complete and other.complete and other.num_calls == 2
