"""Recording a run: a session sees its calls one by one, runs them densely and keeps what they computed.

What is kept is described in ``recording.py``; entering and leaving the mode is ``module.py``'s business.
"""

from __future__ import annotations

from typing import Any

from fisedit_compiler.errors import RecordingError
from fisedit_compiler.runtime.call import Call
from fisedit_compiler.runtime.executable import Executable
from fisedit_compiler.runtime.recorded_inputs import InputCopies
from fisedit_compiler.runtime.recording import Recording


class RecordSession:
    """Runs calls densely and stores their slots; of the first ``maps`` calls also the cross-attention maps."""

    def __init__(self, recording: Recording, maps: int = 0) -> None:
        self.recording, self.maps = recording, maps
        self._inputs = InputCopies()

    def handle(self, call: Call) -> Any:
        executable, number = call.executable, self.recording.num_calls
        maps = number < self.maps
        if maps and not executable.map_names:
            raise RecordingError(
                f"record(maps={self.maps}): the module has no attention from sites to a text whose map could be "
                f"recorded{_why_no_maps(executable)}. Record without maps."
            )
        inputs = self._inputs.of(number, call.signature, call.tensors, executable.sample_slot)
        outputs, slots = executable.record(call.tensors, maps=maps)
        self.recording.calls.append(call.store(slots, call.timestep, inputs))
        return executable.assemble(outputs)


def _why_no_maps(executable: Executable) -> str:
    refusals = executable.program.maps.refusals
    return "" if not refusals else f" ({refusals[0][1] or 'its attention'}: {refusals[0][2]})"
