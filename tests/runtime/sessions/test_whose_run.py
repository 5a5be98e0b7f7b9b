"""Threads and asyncio tasks have runs of their own; who has a part in another's run was given its context."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
import warnings
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import torch

from fisedit_compiler import Recording, SparseModule
from fisedit_compiler.errors import ModeError, RecordingError
from fisedit_compiler.runtime.sessions.record_session import RecordSession
from tests.support.modes import REFUSED, SAMPLE, refused


def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a thread of its own."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function(*arguments)))
    thread.start()
    thread.join()
    return results[0]


# -- tasks ------------------------------------------------------------------------------------------------


async def turns(count: int = 3) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_another_task_has_no_part_in_a_run(compiled: SparseModule) -> None:
    """One that was started before the block calls the original; one that was started inside is asked to say whose."""

    async def bystander() -> None:
        await turns(1)
        assert torch.equal(compiled(SAMPLE), compiled.original(SAMPLE))
        with compiled.record() as own:
            compiled(SAMPLE)
            await turns(1)
        assert own.complete and own.num_calls == 1

    async def intruder() -> None:
        await turns(1)
        refused(lambda: compiled(SAMPLE), f"{REFUSED}.*started before it, or in a context of its own")

    async def run() -> None:
        before = asyncio.create_task(bystander())
        with compiled.record() as recording:
            compiled(SAMPLE)
            inside = asyncio.create_task(intruder())
            apart = asyncio.create_task(bystander(), context=contextvars.Context())
            await turns()
            await asyncio.gather(before, inside, apart)
            await call()
        assert recording.complete and recording.num_calls == 2

    async def call() -> None:
        await turns()
        compiled(SAMPLE)

    asyncio.run(run())


def test_another_task_is_refused_where_no_frame_stays(compiled: SparseModule) -> None:
    stack = contextlib.ExitStack()

    async def enter() -> Recording:
        return stack.enter_context(compiled.record())

    async def intruder() -> None:
        refused(lambda: compiled(SAMPLE))

    async def run() -> None:
        recording = await enter()
        await asyncio.create_task(intruder())
        compiled(SAMPLE)
        stack.close()
        assert recording.complete and recording.num_calls == 1

    asyncio.run(run())


def test_the_consumer_of_a_suspended_async_generator_is_refused(compiled: SparseModule) -> None:
    async def generator() -> AsyncIterator[Recording]:
        with compiled.record() as recording:
            compiled(SAMPLE)
            yield recording

    async def run() -> None:
        async for _ in generator():
            refused(lambda: compiled(SAMPLE))
        async with contextlib.asynccontextmanager(generator)() as recording:
            compiled(SAMPLE)
            assert recording.num_calls == 2
        async with contextlib.AsyncExitStack() as stack:
            recording = await stack.enter_async_context(contextlib.asynccontextmanager(generator)())
            compiled(SAMPLE)
            assert recording.num_calls == 2

    asyncio.run(run())


def test_an_event_loop_inside_a_block_calls_for_it(compiled: SparseModule) -> None:
    async def run() -> None:
        await asyncio.gather(*(asyncio.create_task(call()) for _ in range(2)))

    async def call() -> None:
        compiled(SAMPLE)

    with compiled.record() as recording:
        asyncio.run(run())
    assert recording.complete and recording.num_calls == 2


# -- threads ----------------------------------------------------------------------------------------------


def test_a_thread_that_was_given_the_context_calls_for_the_run(compiled: SparseModule) -> None:
    async def run() -> None:
        with compiled.record() as recording:
            await asyncio.to_thread(compiled, SAMPLE)
            compiled(SAMPLE)
        assert recording.num_calls == 2

    asyncio.run(run())
    with compiled.record() as recording:
        in_thread(contextvars.copy_context().run, compiled, SAMPLE)
    assert recording.num_calls == 1


def test_many_threads_are_in_runs_of_their_own_at_once(compiled: SparseModule) -> None:
    entered, called = threading.Barrier(8, timeout=60), threading.Barrier(8, timeout=60)
    recordings: list[Recording] = []

    def run(number: int) -> None:
        with compiled.record() as recording:
            entered.wait()
            assert "7 runs elsewhere" in repr(compiled)
            for _ in range(number):
                compiled(SAMPLE)
            called.wait()
        recordings.append(recording)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(recording.num_calls for recording in recordings) == list(range(1, 9))
    assert all(recording.complete for recording in recordings)


def test_a_thread_that_was_given_no_context_calls_the_original(compiled: SparseModule) -> None:
    with compiled.record() as recording:
        compiled(SAMPLE)
        assert torch.equal(in_thread(compiled, SAMPLE), compiled.original(SAMPLE))
    assert recording.num_calls == 1


def test_a_run_whose_calls_were_all_made_in_another_thread_is_refused(compiled: SparseModule) -> None:
    words = r"ended after 0 calls.*contextvars\.copy_context\(\)\.run"
    with pytest.raises(RecordingError, match=words), compiled.record() as recording:
        in_thread(compiled, SAMPLE)
    assert not recording.complete
    with compiled.record() as recording:
        compiled(SAMPLE)
    with pytest.raises(RecordingError, match=words), compiled.edit(recording, torch.ones(8, 8, dtype=torch.bool)):
        in_thread(compiled, SAMPLE)


def test_a_run_makes_its_calls_one_after_another(compiled: SparseModule, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, asked = threading.Event(), threading.Event()
    handle = RecordSession.handle

    def waiting(session: RecordSession, call: Any) -> Any:
        inside.set()
        asked.wait(60)
        return handle(session, call)

    with monkeypatch.context() as patch, compiled.record() as recording:
        patch.setattr(RecordSession, "handle", waiting)
        thread = threading.Thread(target=contextvars.copy_context().run, args=(compiled, SAMPLE))
        thread.start()
        inside.wait(60)
        refused(lambda: compiled(SAMPLE), r"A call of this record\(\) is still going on in another thread")
        asked.set()
        thread.join()
        compiled(SAMPLE)
    assert recording.num_calls == 2


def test_reset_leaves_the_runs_of_all_threads(compiled: SparseModule) -> None:
    entered, left = threading.Event(), threading.Event()
    raised: list[BaseException] = []

    def run() -> None:
        try:
            with compiled.record():
                entered.set()
                left.wait(60)
        except ModeError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    entered.wait(60)
    compiled.reset()
    left.set()
    thread.join()
    assert len(raised) == 1 and "left by reset()" in str(raised[0])


def test_a_mode_that_another_thread_made_is_none_of_this_ones(compiled: SparseModule) -> None:
    made, called = threading.Event(), threading.Event()

    def run() -> None:
        mode = compiled.record()
        made.set()
        called.wait(60)
        with mode:
            compiled(SAMPLE)

    thread = threading.Thread(target=run)
    thread.start()
    made.wait(60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(SAMPLE)
    called.set()
    thread.join()
