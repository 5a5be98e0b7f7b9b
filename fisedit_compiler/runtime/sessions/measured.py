"""How long the calls of a session took."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measured:
    """Calls of one kind that the last session with such calls timed.

    Attributes:
        kind: ``dense``, ``sparse`` or ``skipped``.
        calls: how many.
        seconds: the median call's wall time; on a CUDA device that of its launch.
        batch: samples of a call.
        height: rows of the spatial input.
        width: columns of the spatial input.
        area: share of active sites; 1 for dense calls.
        device: where they ran.
    """

    kind: str
    calls: int
    seconds: float
    batch: int
    height: int
    width: int
    area: float
    device: str
