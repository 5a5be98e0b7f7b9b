"""Recording a run: a session sees its calls one by one, runs them densely and keeps what they computed.

What is kept is described in ``recording.py``; entering and leaving the mode is ``module.py``'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fisedit_compiler.errors import RecordingError
from fisedit_compiler.recordings.finite import FiniteWatch, note_not_finite
from fisedit_compiler.recordings.recorded_inputs import InputCopies
from fisedit_compiler.recordings.recording import Recording
from fisedit_compiler.runtime.calls.call import Call
from fisedit_compiler.runtime.calls.programs import ProgramStore
from fisedit_compiler.runtime.execution.executable import Executable
from fisedit_compiler.runtime.sessions.reuse import Movement
from fisedit_compiler.runtime.sessions.self_check import form_of, record_checked
from fisedit_compiler.tensors.contents import Later
from fisedit_compiler.tensors.deferred import DeferredChecks


class RecordSession:
    """Runs calls densely and stores their slots; of the first ``maps`` calls also the cross-attention maps.

    ``expected`` is what the module itself gave for the first call, if that is known. A program that was compared with
    the module before is compared with that, and with the module again only if it differs.
    """

    def __init__(
        self, recording: Recording, programs: ProgramStore, maps: int = 0, expected: Sequence[Any] | None = None
    ) -> None:
        self.recording, self.programs, self.maps, self._expected = recording, programs, maps, expected
        self._interprets = expected is not None
        self._inputs = InputCopies()
        self._finite = FiniteWatch()
        self._compared: set[Executable] = set()
        self._compiled: dict[tuple[Executable, tuple[Any, ...]], bool] = {}
        self._movement = Movement()
        self._deferred = DeferredChecks()
        self._timesteps: list[tuple[int, Tensor]] = []

    def before(self) -> str:
        """Look whether the module is still the one that the recording is of. Another structure is followed.

        Returns:
            The module's structure at this call.

        Raises:
            RecordingError: its weights changed since the first call.
        """
        now = self.programs.glance()
        self._check_weights(now.weights)
        return now.structure

    def finish(self) -> None:
        """The run has ended as it should.

        Raises:
            RecordingError: weights changed meanwhile.
        """
        self._check_weights(self.programs.refresh().weights)
        self._deferred.wait()
        self._note_timesteps()
        note_not_finite(self.recording, self._finite)
        self.recording.complete = True

    def _check_weights(self, weights: str) -> None:
        if weights != self.recording.model.weights:
            raise RecordingError(
                f"The module's weights changed inside record(), after {self.recording.num_calls} calls (an adapter "
                "loaded, fused or removed, a checkpoint loaded, a parameter written to). No edit could repeat such a "
                "run: record it again, and change weights before or after it."
            )

    def handle(self, call: Call) -> Any:
        executable, number = call.executable, self.recording.num_calls
        maps = number < self.maps
        if maps and not executable.map_names:
            raise RecordingError(
                f"record(maps={self.maps}): the module has no attention from sites to a text whose map could be "
                f"recorded{_why_no_maps(executable)}. Record without maps."
            )
        later, timestep = Later(), self._timestep(call)
        known = {} if timestep is None else {"timestep": timestep}
        inputs = self._inputs.of(number, call.signature, call.tensors, executable.sample_slot, known, later)
        compared = executable in self._compared
        confirmed = not executable.unsettled and form_of(call) in executable.confirmed
        expected, self._expected = self._expected, None
        if confirmed and compared:
            outputs, slots = executable.record(call.tensors, maps=maps, compiled=self._is_compiled(call))
        else:
            made = executable.interpret(call.tensors, maps=maps) if confirmed and expected is not None else None
            is_compiled = False
            if made is None or not _same_bits(made[0], expected):
                given = call
                wanted = confirmed and not maps and self._is_compiled(call)
                checked = record_checked(self.programs, call, maps=maps, may_capture=not compared, compiled=wanted)
                executable, made, is_compiled = checked.executable, checked.recorded, checked.is_compiled
                structure = self.programs.structure_of(executable) or self.programs.name_now(given.structure)
                call = replace(call, find_executable=lambda: executable, structure=structure)
                if self.recording.model.structure == given.structure:
                    self.recording.model = self.recording.model._replace(structure=structure)
                self.programs.follow_renames(self.recording)
            # What was compared bit for bit is interpreted; all calls of a run are to be made alike.
            again = not is_compiled and not maps and self._is_compiled(call)
            outputs, slots = executable.record(call.tensors, compiled=True) if again else made
        self._compared.add(executable)
        if timestep is not None:
            self._timesteps.append((number, timestep))
        recorded = call.store(slots, None if timestep is not None else call.timestep, inputs)
        self.recording.calls.append(replace(recorded, movement=self._movement.at(executable.program, slots)))
        self._finite.look(outputs)
        later.defer(self._deferred, executable.hoisted.clear)
        self._deferred.poll()
        return executable.assemble(outputs)

    def _timestep(self, call: Call) -> Tensor | None:
        """A copy of the timestep, if reading it would wait for the device, which had nothing to do then."""
        if not call.has_timestep:
            return None
        value = call.tensors["timestep"]
        return value.clone() if value.is_cuda else None

    def _note_timesteps(self) -> None:
        """Read the timesteps of all calls, which nobody waited for while they were made."""
        if self._timesteps:
            # Whole and half numbers of whatever type are the same in this one.
            values = torch.stack([value.to(torch.float64).reshape(()) for _, value in self._timesteps]).tolist()
            for (number, _), value in zip(self._timesteps, values, strict=True):
                self.recording.calls[number] = replace(self.recording.calls[number], timestep=value)

    def _is_compiled(self, call: Call) -> bool:
        """Whether such calls of this run are compiled: as was decided at the first of them.

        Not where the module's own outputs are known: bits are compared with them, and they are there to be given.
        """
        if self._interprets:
            return False
        form = (call.executable, form_of(call))
        if form not in self._compiled:
            self._compiled[form] = call.executable.expect_dense(call.tensors)
        return self._compiled[form]


def _same_bits(outputs: Sequence[Any], expected: Sequence[Any] | None) -> bool:
    if expected is None or len(outputs) != len(expected):
        return False
    return all(
        isinstance(left, Tensor) and isinstance(right, Tensor) and torch.equal(left, right)
        for left, right in zip(outputs, expected, strict=True)
    )


def _why_no_maps(executable: Executable) -> str:
    refusals = executable.program.maps.refusals
    return "" if not refusals else f" ({refusals[0][1] or 'its attention'}: {refusals[0][2]})"
