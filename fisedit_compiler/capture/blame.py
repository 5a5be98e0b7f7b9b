"""Where in the user's model something failed, for errors that torch raises without saying so.

Two sources: the traceback, where the failing line of the model is among its frames; and the guards on sizes that
torch.export made, where it only complained at the end about all of them together. Messages are written where errors
are raised.
"""

from __future__ import annotations

import logging
import random
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import sympy
import torch
from torch import nn

TORCH_DIRECTORY = str(Path(torch.__file__).parent)
_NOT_THE_USERS = (TORCH_DIRECTORY, str(Path(__file__).parents[1]))
_GUARDS = "torch.fx.experimental.symbolic_shapes"
_SIZES = (2, 3, 4, 5, 7, 8, 9, 16, 31, 60)
"""In units of the smallest size: what every dimension may be, besides its example."""


def place_in_traceback(error: BaseException, module: nn.Module) -> str:
    """`` in <module path> (file.py:12: code)`` of the innermost line of the user's model; empty if it has no part."""
    return _innermost(reversed(list(traceback.walk_tb(error.__traceback__))), _paths(module))


@dataclass
class Guards:
    """Guards on sizes, in the order in which they were made.

    Attributes:
        made: each guard (a sympy condition on sizes) and the place in the user's model that made it.
        hints: the example size behind each symbol.
    """

    made: list[tuple[Any, str]] = field(default_factory=list)
    hints: dict[sympy.Symbol, int] = field(default_factory=dict)

    def place_of_violation(self, units: Mapping[int, int]) -> str:
        """The place of the first guard that some permitted sizes break; empty if there is none.

        Args:
            units: for every example size of a dimension, what its sizes are multiples of.
        """
        draws = random.Random(0)
        for guard, place in self.made:
            hints = {symbol: self.hints.get(symbol) for symbol in guard.free_symbols}
            if not place or not all(hint in units for hint in hints.values()):
                continue
            for _ in range(60):
                # The same example size is the same dimension: two inputs of one height have one height.
                chosen = {hint: units[hint] * draws.choice(_SIZES) for hint in set(hints.values()) if hint is not None}
                values = {symbol: chosen[hint] for symbol, hint in hints.items() if hint is not None}
                if guard.xreplace({symbol: sympy.Integer(value) for symbol, value in values.items()}) == sympy.false:
                    return place
        return ""


@contextmanager
def watch_guards(module: nn.Module) -> Iterator[Guards]:
    """Note every guard that torch makes while the block runs, with the line of ``module`` that needs it.

    Torch logs a guard when it makes it, so that the stack of the log call is that of the model's line. The guard is
    read off the frame that logs (``ShapeEnv._log_guard``, the same in torch 2.11 to 2.13): its text alone cannot be
    evaluated. Should another release not have it, no guard is noted.
    """
    found, paths = Guards(), _paths(module)

    class Watcher(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            frame: FrameType | None = sys._getframe()
            while frame is not None and frame.f_code.co_name != "_log_guard":
                frame = frame.f_back
            if frame is None or not isinstance(guard := frame.f_locals.get("g"), sympy.Basic):
                return
            hints = getattr(frame.f_locals.get("self"), "backed_var_to_val", {})
            for symbol in guard.free_symbols:
                if symbol in hints:
                    found.hints[symbol] = int(hints[symbol])
            found.made.append((guard, _innermost(traceback.walk_stack(frame), paths)))

    logger = logging.getLogger(_GUARDS)
    before = (logger.handlers, logger.level, logger.propagate, logger.disabled)
    logger.handlers, logger.propagate, logger.disabled = [Watcher()], False, False
    logger.setLevel(logging.INFO)
    try:
        yield found
    finally:
        logger.handlers, level, logger.propagate, logger.disabled = before
        logger.setLevel(level)


def _paths(module: nn.Module) -> dict[int, str]:
    return {id(part): path for path, part in module.named_modules()}


def _innermost(frames: Iterator[tuple[FrameType, int]], paths: Mapping[int, str]) -> str:
    """The first of the frames, innermost first, that is a line of a part of the user's model."""
    for frame, line in frames:
        code = frame.f_code
        part = paths.get(id(frame.f_locals.get(code.co_varnames[0]))) if code.co_argcount else None
        if part is None or code.co_filename.startswith(_NOT_THE_USERS):
            continue
        summary = traceback.FrameSummary(code.co_filename, line, code.co_name)
        return f" in {part or 'the top module'} ({Path(summary.filename).name}:{summary.lineno}: {summary.line})"
    return ""
