"""Whose run a mode is: which calls are made from inside the block that entered it.

A run belongs to the context in which its mode was entered, and a context variable finds it (``modes.py``). That is not
enough within one thread: a generator shares its consumer's context, and a task started inside the block has a copy of
it. The consumer of a generator that is suspended inside its own ``with``, and such a task, may call the same module
meanwhile; their calls must not be recorded as the run's. The stack tells them apart: the frame with the ``with``
statement is among the callers of every call made inside it. Finding it takes well under a microsecond a frame.

Another thread has a run's context only if somebody gave it (``asyncio.to_thread``, ``contextvars.copy_context().run``),
and then calls for it.

A block may be entered on somebody's behalf, and then the frame that did it has returned when calls come: by
``ExitStack.enter_context``, by a class's ``__enter__``, by a generator under ``contextlib.contextmanager`` or one that
is a pytest fixture. Such a mode is its caller's; where that caller has no frame to look for, its task counts.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import weakref
from dataclasses import dataclass
from types import FrameType

from fisedit_compiler.errors import ModeError

ENTERING = frozenset(
    {"__enter__", "__aenter__", "enter_context", "enter_async_context", "enterContext", "enterAsyncContext"}
)
"""Functions that enter a context manager for whoever called them."""

FIXTURES = ("_pytest.", "pytest_", "anyio.")
"""Modules that keep a generator suspended for a test which is called from elsewhere."""

_GENERATORS = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR

REMEDY = (
    "Enter a mode of its own where the call is made: runs of different threads and tasks do not touch each other. A "
    "task that was started inside another run's block has to be started before it, or in a context of its own "
    "(asyncio.create_task(..., context=contextvars.Context()))."
)


@dataclass(frozen=True)
class Scope:
    """Who entered a mode, so that calls made from there are its run's.

    Attributes:
        place: function, file and line, for messages.
        thread: its identity.
        task: the asyncio task it was entered in, if any.
        frame: identity of the frame that must be among a call's callers; 0 if it may have returned meanwhile.
    """

    place: str
    thread: int
    task: weakref.ref[asyncio.Task[object]] | None
    frame: int

    @staticmethod
    def of(frame: FrameType, *, by_with: bool) -> Scope:
        """The scope of the frame that calls a mode's ``__enter__``.

        Args:
            frame: the direct caller.
            by_with: whether it does so by a ``with`` statement, so that it cannot return before the mode is left.
        """
        owner, handed_on = _owner(frame)
        fixture = _is_fixture(owner)
        stays = bool(owner.f_code.co_flags & _GENERATORS) or (by_with and not handed_on)
        task = None if fixture else _current_task()
        return Scope(
            place=f"{owner.f_code.co_qualname}() at {owner.f_code.co_filename}:{owner.f_lineno}",
            thread=threading.get_ident(),
            task=None if task is None else weakref.ref(task),
            frame=id(owner) if stays and not fixture else 0,
        )

    def check(self, mode: str, caller: FrameType | None) -> None:
        """Refuse a call that is not made from inside the block.

        Args:
            mode: its name, for the message.
            caller: the innermost frame of the call.

        Raises:
            ModeError: another task or consumer makes it.
        """
        if threading.get_ident() != self.thread:
            return  # it was given this context
        if self.frame:
            while caller is not None:
                if id(caller) == self.frame:
                    return
                caller = caller.f_back
        elif self.task is None or _current_task() is self.task():
            return
        raise ModeError(
            f"This module is inside {mode}() of {self.place}, and this call is not made from there: another task makes "
            f"it, or {mode}() was entered by a generator that is suspended. {REMEDY} A generator that enters a mode "
            "for its caller must be a context manager (contextlib.contextmanager)."
        )


def _owner(frame: FrameType) -> tuple[FrameType, bool]:
    """The frame that a mode is entered for, and whether others did it on its behalf."""
    handed_on = False
    while True:
        driver = frame.f_back
        if frame.f_code.co_flags & _GENERATORS:
            # Delegation (`yield from`, torch.no_grad() on a generator) suspends a row of generators together.
            while driver is not None and driver.f_code.co_flags & _GENERATORS:
                driver = driver.f_back
            if driver is None or not (_is_entering(driver) or _is_fixture(driver)):
                return frame, handed_on
        elif driver is None or not _is_entering(frame):
            return frame, handed_on
        frame, handed_on = driver, True


def _is_entering(frame: FrameType) -> bool:
    return frame.f_code.co_name in ENTERING


def _is_fixture(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).startswith(FIXTURES)


def _current_task() -> asyncio.Task[object] | None:
    loop = asyncio._get_running_loop()
    return None if loop is None else asyncio.current_task(loop)
