"""Kernels are compiled before their first launch, side by side, while something else keeps the main thread busy.

Triton lets go of Python's lock while its passes, LLVM and ``ptxas`` work, nine tenths of the time, so threads will do:
what they compiled is known to the kernel (and on disk) as if a launch had compiled it, and no process has to be started
or ended. Whatever fails here fails again, or does not, where the kernel is launched: nobody is told but the debug log.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor

from triton.runtime import JITFunction, driver

from fisedit_compiler.kernels.triton.launching import Launch

logger = logging.getLogger(__name__)

MOST_THREADS = 8


class CompiledAhead:
    """Compiles for the current device what it is told of, until the block is left.

    Leaving it waits for all of it; with an error, only for what was begun.
    """

    def __init__(self) -> None:
        self._device = driver.active.get_current_device()
        self._known: set[Hashable] = set()
        self._threads: ThreadPoolExecutor | None = None

    def __enter__(self) -> CompiledAhead:
        return self

    def add(self, launch: Launch) -> None:
        """Compile what a launch will run, unless that was asked for before."""
        form = launch.form
        if form in self._known or not isinstance(launch.kernel, JITFunction):  # or Triton interprets
            return
        self._known.add(form)
        if self._threads is None:
            self._threads = ThreadPoolExecutor(threads(), "fisedit-triton")
        self._threads.submit(_compile, launch, self._device)

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=error is not None)
            logger.debug("%d kernels were to be compiled ahead", len(self._known))


def threads() -> int:
    """How many compile at once: the main thread works meanwhile, and so do Inductor's own processes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_THREADS, cores // 2))


def _compile(launch: Launch, device: int) -> None:
    try:
        driver.active.set_current_device(device)  # every thread has one of its own
        launch.warm_up()
    except Exception:
        logger.debug("%s was not compiled ahead", launch.kernel, exc_info=True)
