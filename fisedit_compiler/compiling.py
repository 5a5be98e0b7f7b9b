"""Who may compile, and who may compute meanwhile: one compilation at a time in a process, beside any number of calls.

``torch.export`` is not thread-safe: two at once corrupt its stack of modes ("Trying to pop empty mode stack"). So
whatever captures, rewrites or lowers takes one lock: of two first uses in two threads one compiles and the other waits,
then finds the result if it is the same. What is made already is looked up without the lock.

An export also disturbs whoever only computes: while it traces, oneDNN and cuDNN are off for the whole process, so that
last bits differ, and ``nn.Module.__call__`` notes the modules it passes through, whichever thread calls them. So calls
are made :func:`computing`, of any number of threads at once, and an export is made :func:`alone`: it waits for the
calls that are going on, and those that come wait for it.

The order of locks: whoever waits for :data:`COMPILING` holds nothing that others need to finish their calls. A thread
that is computing lets go meanwhile; locks of what runs share (``runtime``) are taken inside of both, never around.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
K = TypeVar("K")
V = TypeVar("V")

LOOK = 0.2
"""Seconds after which somebody who waits for a thread looks what it does."""


class _Thread:
    """A thread that ever computed. Whoever computes holds the lock of the own thread, whoever is alone holds all."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.number = threading.get_ident()

    def wait(self) -> Any:
        """Take the thread's lock; returns what releases it."""
        while not self.lock.acquire(timeout=LOOK):
            if not self._is_here():
                self.lock = threading.RLock()  # Ctrl-C kept it from letting go of the old one
        return self.lock.release

    def _is_here(self) -> bool:
        """Whether the thread is inside this package, where alone it computes."""
        frame = sys._current_frames().get(self.number)
        while frame is not None and not str(frame.f_globals.get("__name__", "")).startswith(__package__):
            frame = frame.f_back
        return frame is not None


_known = threading.RLock()
"""Held while the list below changes, and by whoever is alone, so that no thread comes in anew."""
_threads: list[weakref.ref[_Thread]] = []
"""As long as they live."""


class _Mine(threading.local):
    def __init__(self) -> None:
        self.thread = _Thread()
        with _known:
            _threads[:] = [*(known for known in _threads if known() is not None), weakref.ref(self.thread)]


_mine = _Mine()


class _GivingWay:
    """Inside the block the thread is not computing, so that whoever is alone need not wait for one that waits."""

    def __enter__(self) -> None:
        self._times = 0
        with suppress(RuntimeError):  # released as often as it was taken
            while True:
                _mine.thread.lock.release()
                self._times += 1

    def __exit__(self, *error: object) -> None:
        for _ in range(self._times):
            _mine.thread.lock.acquire()


COMPILING = threading.RLock()
"""Held by whoever compiles; re-entrant, as compiling one thing makes others. Take it by :func:`compiling_now`."""


@contextmanager
def compiling_now() -> Iterator[None]:
    """Inside the block no other thread compiles."""
    with _GivingWay(), COMPILING:
        yield


def computing() -> AbstractContextManager[Any]:
    """Inside the block nobody is :func:`alone` but this thread."""
    lock: AbstractContextManager[Any] = _mine.thread.lock
    return lock


@contextmanager
def alone() -> Iterator[None]:
    """Inside the block no other thread is :func:`computing`, and none compiles."""
    with compiling_now(), _known, ExitStack() as stack:
        for known in _threads:
            if (thread := known()) is not None:
                stack.callback(thread.wait())
        yield


def one_at_a_time(function: Callable[P, V]) -> Callable[P, V]:
    """Run a function under :data:`COMPILING`."""

    @wraps(function)
    def locked(*args: P.args, **kwargs: P.kwargs) -> V:
        with compiling_now():
            return function(*args, **kwargs)

    return locked


def made_once(known: MutableMapping[K, V], key: K, make: Callable[[], V]) -> V:
    """What is known under a key; made first, by one thread while others wait, if nothing is."""
    found = known.get(key)
    if found is None:
        with compiling_now():
            found = known.get(key)
            if found is None:
                found = known[key] = make()
    return found
