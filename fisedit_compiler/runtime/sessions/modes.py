"""Which runs a module is in, entered and left so that no interrupt leaves it in one for good.

A run is its context's: a context variable says which is active, so that threads and asyncio tasks have runs of their
own on one module, and whoever has none calls the original. That a generator shares its consumer's context, and a task
started inside the block has a copy of it, is ``scopes.py``'s business.

Ctrl-C may strike between any two instructions: after ``__enter__`` has returned to ``ExitStack``, or at the first
instruction of ``__exit__``, where no ``try`` can stand. So a mode is not a flag that somebody must remember to clear.
It lasts *as long as somebody can leave it*: what a ``with`` statement keeps of a context manager is what it found under
``__exit__``, which is made anew for each look-up here and only watched, by a weak reference. When the statement is
over, however it ended, that object is gone, and so is the mode. Tracebacks keep frames and their variables, not this
object. (Where a mode is entered without a ``with`` statement, as ``ExitStack`` does, the :class:`Mode` itself is
watched, which a traceback may keep; :meth:`Modes.reset` leaves it.)

No lock is held either, which an interrupt might leave locked: a claim is one insertion into a dictionary. A context
only refers to it weakly: contexts are copied, and a copy may outlive the run.
"""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from fisedit_compiler.errors import ModeError
from fisedit_compiler.runtime.sessions.scopes import Scope

T = TypeVar("T")
Body = Generator[tuple[Any, T], None, None]
"""What a mode does: yields once, its session (``None``: calls run as the original's) and what the block gets. What
stands after the ``yield`` runs only if the block ended well; a ``finally`` runs in any case."""

OTHER_THREADS = (
    "If the pipeline calls it in a thread of its own, start that thread in the context of the block, "
    "`Thread(target=contextvars.copy_context().run, args=(work,))` or `asyncio.to_thread`: a thread that was not given "
    "it has no part in the run."
)
"""What to do where calls of a run were made in another thread."""


@dataclass(eq=False)
class Entered:
    """A mode that was entered.

    Attributes:
        name: ``record``, ``edit``, ...
        scope: who entered it.
        leaver: alive as long as somebody can leave it.
        session: what handles calls; ``None`` while the mode is made ready, and in modes without calls.
        calling: held while a call is made. A run makes its calls one after another.
        passed_by: whether somebody without a run called the module meanwhile.
    """

    name: str
    scope: Scope
    leaver: Callable[[], object]
    session: Any = None
    calling: threading.Lock = field(default_factory=threading.Lock)
    passed_by: bool = False

    @contextmanager
    def one_call(self) -> Iterator[None]:
        """Make one call of the run.

        Raises:
            ModeError: the one before it is still going on, in another thread.
        """
        if not self.calling.acquire(blocking=False):
            raise ModeError(
                f"A call of this {self.name}() is still going on in another thread. A run makes its calls one after "
                f"another; enter {self.name}() anew for each run that is to go on at the same time."
            )
        try:
            yield
        finally:
            self.calling.release()


class Modes:
    """The modes of one module, of which one at most is active in each context."""

    def __init__(self) -> None:
        self._claims: dict[Entered, None] = {}
        self._here: ContextVar[weakref.ref[Entered] | None] = ContextVar("fisedit_run", default=None)
        self._made: dict[int, str] = {}  # by thread, the name of the mode that was made last and not entered yet

    @property
    def is_idle(self) -> bool:
        """Whether a call is the original's without a further look: no mode was entered, nor made to be."""
        # An outer torch.compile guards lengths; what `not` says of a dictionary it takes for a constant.
        return len(self._claims) == 0 and len(self._made) == 0

    def make(self, name: str) -> int:
        """A mode was made, which is to be entered; tells where, for :meth:`entering`."""
        thread = threading.get_ident()
        self._made[thread] = name
        return thread

    def entering(self, made: int) -> None:
        """The mode that was made there is entered."""
        self._made.pop(made, None)

    def remind(self) -> None:
        """Say that a call is the original module's although a mode was made for it."""
        name = self._made.pop(threading.get_ident(), None)
        if name is not None:
            warnings.warn(_not_entered(name), RuntimeWarning, stacklevel=5)

    @property
    def active(self) -> Entered | None:
        """The mode that the module is in, seen from this context."""
        reference = self._here.get()
        entered = None if reference is None else reference()
        return entered if entered is not None and self._is_alive(entered) else None

    def session(self) -> Entered | None:
        """The mode whose session handles the call that is being made; ``None`` if the original does.

        Raises:
            ModeError: the call is not made from inside the block that entered the mode.
        """
        entered = self.active
        if entered is None:
            self.remind()
            for other in self._living():
                other.passed_by = True
            return None
        if entered.session is None:
            return None
        entered.scope.check(entered.name, sys._getframe(1))
        return entered

    def claim(self, entered: Entered) -> None:
        """Make a mode the active one of this context.

        Raises:
            ModeError: another is.
        """
        active = self.active
        if active is not None:
            raise ModeError(
                f"{entered.name}() was entered while {active.name}() is active on the same module. Modes do not nest: "
                "leave the first `with` block before entering the next. It was entered by "
                f"{active.scope.place}; if that run is over and something still holds its mode, reset() leaves it."
            )
        self._claims[entered] = None
        self._here.set(weakref.ref(entered))

    def release(self, entered: Entered) -> None:
        """Leave a mode; leaving twice is fine."""
        self._claims.pop(entered, None)

    def holds(self, entered: Entered) -> bool:
        """Whether a mode has not been left."""
        return entered in self._claims

    def count(self) -> int:
        """How many runs are going on, in all contexts."""
        return len(self._living())

    def reset(self) -> None:
        """Leave whatever modes are active, from anywhere."""
        self._claims.clear()

    def _living(self) -> list[Entered]:
        return [entered for entered in list(self._claims) if self._is_alive(entered)]  # a copy: others may claim

    def _is_alive(self, entered: Entered) -> bool:
        if entered in self._claims and entered.leaver() is not None:
            return True
        self.release(entered)
        return False


def _not_entered(name: str) -> str:
    return (
        f"{name}() does nothing until it is entered, so calls are the original module's: nothing is recorded, and "
        f"nothing outside a mask is kept. Run the pipeline inside `with compiled.{name}(...):`."
    )


class Mode(Generic[T]):
    """A context manager for one run in a mode: ``with compiled.record() as recording: ...``."""

    def __init__(self, modes: Modes, name: str, body: Body[T]) -> None:
        self._modes, self._name, self._body = modes, name, body
        self._entered: Entered | None = None
        self._leaver: weakref.ref[Any] | None = None
        self._made = modes.make(name)  # told at the next call; in a ``__del__`` an interrupt would be lost

    def __enter__(self) -> T:
        if self._entered is not None:
            raise ModeError(f"This {self._name}() was entered before. Call {self._name}() again for each run.")
        self._modes.entering(self._made)
        # No variable may hold the leaver itself: a traceback would keep it with this frame.
        by_with = self._leaver is not None and self._leaver() is not None
        leaver = self._leaver if self._leaver is not None and by_with else weakref.ref(self)
        entered = Entered(self._name, Scope.of(sys._getframe(1), by_with=by_with), leaver)
        self._entered = entered
        self._modes.claim(entered)
        try:
            entered.session, value = next(self._body)
            return value
        except BaseException:
            self._modes.release(entered)
            raise

    if TYPE_CHECKING:

        def __exit__(
            self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
        ) -> None: ...


class _Exit:
    """``Mode.__exit__``: a new object each time it is looked up, alive as long as it may still be called."""

    def __get__(self, mode: Mode[Any] | None, owner: type | None = None) -> Callable[..., None]:
        if mode is None:  # ExitStack looks it up on the class and keeps the mode itself
            return _leave
        leave = partial(_leave, mode)
        if mode._entered is None:
            mode._leaver = weakref.ref(leave)
        return leave


setattr(Mode, "__exit__", _Exit())  # noqa: B010 - to mypy it is the method declared above


def _leave(
    mode: Mode[Any], kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
) -> None:
    entered = mode._entered
    if entered is None:
        return
    try:
        if kind is not None:
            mode._body.close()
        elif mode._modes.holds(entered):
            next(mode._body, None)
        else:
            mode._body.close()
            raise ModeError(
                f"{entered.name}() was left by reset() while its block was running: calls made since were the original "
                "module's. Make the run again, and call reset() only when no run is going on."
            )
    finally:
        mode._modes.release(entered)
