"""Reuse across steps: which calls of an edit are shallow, planned from how far the base run moved.

A full call keeps what came up from coarser levels; a shallow one takes it from there and computes the finest level
only. While a run is recorded, it is noted how far that moved from each call to the next. An edit follows its base, so
its own values age as fast: a call is shallow if the movement since the last full call stays below a tolerance. What is
planned depends on the recording and the tolerance only, not on the mask, nor on when it is found. So an edit of an edit
makes full calls where that one did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fisedit_compiler.config import Reuse, check_reuse
from fisedit_compiler.errors import ConfigError
from fisedit_compiler.geometry.site_plan import SitePlan
from fisedit_compiler.lowering.program import CompiledProgram
from fisedit_compiler.recordings.recording import Recording
from fisedit_compiler.runtime.execution.executable import Executable
from fisedit_compiler.runtime.execution.held_rows import HeldRows

TOLERANCE = 0.2
"""What ``"auto"`` stands for. At 0.2 each of 260 local edits kept at least 28 dB inside its mask, at 0.25 96.5 % did
(``docs/quality.md``, "What reuse across steps costs")."""


class Movement:
    """How far what comes up from coarser levels moves between the calls of a run that is recorded."""

    def __init__(self) -> None:
        self._program: CompiledProgram | None = None
        self._before: Sequence[Tensor] = ()

    @torch.no_grad()
    def at(self, program: CompiledProgram, slots: Mapping[str, Tensor]) -> Tensor | None:
        """The movement from the call before to the one that left these slots.

        It is the largest of what the values at the cut are computed from, each relative to its norm; a scalar on their
        device, which nobody waits for. ``None`` if there was no such call of the same program and sizes.
        """
        if isinstance(program.cut, str):
            return None
        before, self._before = self._before, [slots[name] for name in program.cut.sources]
        same, self._program = self._program is program, program
        if not same or [value.shape for value in before] != [value.shape for value in self._before]:
            return None
        return torch.stack([_moved(*pair) for pair in zip(before, self._before, strict=True)]).amax()


def _moved(before: Tensor, now: Tensor) -> Tensor:
    now, before = now.float(), before.float()
    norm = torch.linalg.vector_norm(now)
    return torch.linalg.vector_norm(now - before) / norm.clamp_min(torch.finfo(torch.float32).tiny)


def shallow_calls(movement: Sequence[float | None], tolerance: float) -> tuple[bool, ...]:
    """For every call whether it is shallow.

    Args:
        movement: of every call from the one before; ``None`` where it is unknown.
        tolerance: how far values may have moved, in all, since the full call that they are from.
    """
    planned: list[bool] = []
    since = 0.0
    for moved in movement:
        shallow = moved is not None and bool(planned) and since + moved <= tolerance
        since = since + moved if shallow and moved is not None else 0.0
        planned.append(shallow)
    return tuple(planned)


class ReusePlan:
    """Reuse in one edit.

    Attributes:
        tolerance: how far held values may have moved; ``None`` if nothing is reused.
        shallow: for every call of the recording whether it is to be shallow.
        full: the call that held values are from.
    """

    def __init__(self, recording: Recording, reuse: Reuse) -> None:
        """Plan an edit of a recording.

        Raises:
            ConfigError: ``reuse`` is no tolerance.
        """
        check_reuse(reuse, "reuse")
        self.asked = reuse
        self.tolerance = None if reuse == "off" else TOLERANCE if reuse == "auto" else float(reuse)
        self.shallow: tuple[bool, ...] = ()
        self.full: int | None = None
        self._held = HeldRows()
        if self.tolerance is not None:
            self.shallow = shallow_calls(_movement(recording), self.tolerance)

    def start(self, executable: Executable) -> HeldRows | None:
        """What a sparse call of a program keeps and takes; ``None`` if it does neither.

        Raises:
            ConfigError: a tolerance was asked for, and the program offers no cut.
        """
        if self.tolerance is None:
            return None
        check_cut(executable.program, self.asked)
        return self._held if any(self.shallow) and not isinstance(executable.program.cut, str) else None

    def is_shallow(self, call: int, executable: Executable, plan: SitePlan, sample: Tensor) -> bool:
        """Whether a sparse call, for which :meth:`start` gave something, is shallow. Told of every one of them."""
        shallow = self.shallow[call] and self._held.fit(executable.program, plan, sample)
        if not shallow:
            self.full = call
        return shallow

    def forget(self) -> None:
        """Other sites are edited from now on, or a call was made otherwise: the next one is full."""
        self._held.drop()


def check_cut(program: CompiledProgram, reuse: Reuse) -> None:
    """Refuse a tolerance where nothing can be reused.

    Raises:
        ConfigError: says why not.
    """
    if isinstance(program.cut, str) and reuse not in ("off", "auto"):
        raise ConfigError(
            f"reuse={reuse!r}: the model offers no place where a call could take values from an earlier one: "
            f"{program.cut}. Leave reuse out, or pass 'auto', which reuses where it can."
        )


def _movement(recording: Recording) -> list[float | None]:
    known = [call.movement for call in recording.calls if call.movement is not None]
    # One transfer for all of them.
    values = iter(torch.stack(known).tolist() if known else [])
    return [None if call.movement is None else next(values) for call in recording.calls]
