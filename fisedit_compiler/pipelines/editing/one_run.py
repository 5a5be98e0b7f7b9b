"""One run of a pipeline at a time: its scheduler, its step and its progress bar are the run's, so a second one is
refused. Models may be shared by any number of pipelines.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fisedit_compiler.errors import ModeError


@dataclass
class _Use:
    """Who runs a pipeline."""

    lock: Any = field(default_factory=threading.RLock)
    thread: str = ""


_uses: weakref.WeakKeyDictionary[Any, _Use] = weakref.WeakKeyDictionary()
_looking = threading.Lock()


@contextmanager
def only_run_of(pipe: Any) -> Iterator[None]:
    """Inside the block no other thread's Editor runs the pipeline.

    Raises:
        ModeError: one does.
    """
    with _looking:
        use = _uses.setdefault(pipe, _Use())
    if not use.lock.acquire(blocking=False):
        name = type(pipe).__name__
        raise ModeError(
            f"This {name} is in the middle of another run, in thread {use.thread!r}: its scheduler and settings are "
            "that run's. Make one run after the other, or give each a pipeline and an Editor of its own, which may "
            f"share the models: {name}(**{{**pipe.components, 'scheduler': copy.deepcopy(pipe.scheduler), "
            "'tokenizer': copy.deepcopy(pipe.tokenizer)})."
        )
    try:
        use.thread = threading.current_thread().name
        yield
    finally:
        use.lock.release()
