"""Which call of a recording a run reads next, told to the store that holds its slots."""

from __future__ import annotations

from fisedit_compiler.recordings.recording import Recording


class Upcoming:
    """The calls of one run that reads a recording, in order: each is announced once, before it is read.

    The first call is announced when the run begins, every other one when the call before it begins: before anything of
    that is launched, so that what moves for the next call moves beside it. It makes no difference how calls run then,
    sparsely, densely or not at all, and whether one is refused and made again.
    """

    def __init__(self, recording: Recording) -> None:
        """A run begins."""
        self._calls, self._announced = recording.calls, 0
        self._announce()

    def begin(self, call: int) -> None:
        """A call begins, numbered from 0."""
        if self._announced <= call + 1:
            self._announce()

    def _announce(self) -> None:
        if self._announced < len(self._calls):
            self._calls[self._announced].slots.prefetch(self._announced)
            self._announced += 1
