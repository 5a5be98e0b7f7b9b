"""What a compilation is at, in the log and as a bar on stderr: it takes a minute in which nothing else is seen.

A bar is diffusers' own, so that it stands below that of a running pipeline and is switched off with the others. It
shows only after half a second, on a terminal or in a notebook, and leaves nothing behind; stdout is never written to.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, Literal, get_args

logger = logging.getLogger(__name__)

Stage = Literal["capture", "rewrite", "Inductor", "CUDA graph"]
STAGES: tuple[Stage, ...] = get_args(Stage)
EAGER_STAGES = 2
"""Of :data:`STAGES`, those of a program that runs eagerly."""

DELAY = 0.5
"""Seconds before a bar is shown, and between its updates."""

_wanted: ContextVar[bool] = ContextVar("fisedit_progress", default=True)


@contextmanager
def shown(wanted: bool) -> Iterator[None]:
    """Inside the block bars may show, or none does; the log is the same."""
    token = _wanted.set(wanted and _wanted.get())
    try:
        yield
    finally:
        _wanted.reset(token)


@contextmanager
def compiling(stage: Stage, lowered: bool = True, what: str = "sparse calls") -> Iterator[None]:
    """Say that a stage begins and, with the seconds it took, that it ended.

    Args:
        stage: which.
        lowered: whether all stages follow, or those of a program that runs eagerly.
        what: is compiled for.
    """
    number, count = STAGES.index(stage) + 1, len(STAGES) if lowered else EAGER_STAGES
    title = f"compiling for {what}, {number}/{count} {stage}"
    logger.info("%s: this can take a minute", title)
    start = time.perf_counter()
    with _bar(title, number, count):
        yield
    logger.info("%s: done after %.1f s", title, time.perf_counter() - start)


@contextmanager
def _bar(title: str, number: int, count: int) -> Iterator[None]:
    """A bar whose seconds go on while Python waits for a compiler."""
    if not _is_visible():
        yield
        return
    from diffusers.utils.logging import tqdm

    layout = "{desc} |{bar:20}| {elapsed}"
    bar: Any = tqdm(
        desc=title, total=count, initial=number - 1, delay=DELAY, miniters=0, leave=False, bar_format=layout
    )
    ended = threading.Event()

    def tick() -> None:
        # A terminal that went away must not be noticed here.
        with suppress(Exception):
            while not ended.wait(DELAY):
                bar.update(0)

    ticking = threading.Thread(target=tick, name="fisedit-progress", daemon=True)
    ticking.start()
    try:
        yield
    finally:
        ended.set()
        ticking.join()
        with suppress(Exception):
            bar.close()


def _is_visible() -> bool:
    """Whether somebody would see a bar and has not switched bars, or this package's warnings, off."""
    return _wanted.get() and logger.isEnabledFor(logging.WARNING) and (_is_terminal() or _is_notebook())


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # no stderr, or a closed one
        return False


def _is_notebook() -> bool:
    from rich.console import Console

    return "ipykernel" in sys.modules and Console().is_jupyter
