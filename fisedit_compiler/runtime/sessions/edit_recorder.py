"""An edit as recordings: what each of its calls leaves behind, taken apart by copy where several edits run at once.

What a slot of an edited call is made of is written in ``turns.py``; here it is put together with the call's inputs into
the calls of one recording per copy.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fisedit_compiler.recordings.recorded_inputs import InputCopies
from fisedit_compiler.recordings.recording import CallRecord, Recording
from fisedit_compiler.recordings.stores import SlotStore
from fisedit_compiler.recordings.turns import after_dense_call, after_sparse_call, pinned_updates, unchanged
from fisedit_compiler.runtime.sessions.copies import OwnSites, take_copies, take_copy
from fisedit_compiler.slots.turn import Turn
from fisedit_compiler.tensors.contents import Later

if TYPE_CHECKING:
    from fisedit_compiler.runtime.calls.call import Call
    from fisedit_compiler.runtime.execution.executable import Executable


class EditRecorder:
    """Records the calls of an edit, or of several of them in one batch, as views of the calls they edited.

    Attributes:
        results: one recording per copy; none if nothing is recorded.
        later: takes the comparisons of the current call's inputs that a CUDA device need not be waited for.
    """

    def __init__(self, recording: Recording, copies: int, record: bool) -> None:
        self.recording, self.copies = recording, copies
        self.results = tuple(Recording(recording.model, recording.config) for _ in range(copies if record else 0))
        self.later: Later | None = None
        for result in self.results:
            _settle_with(recording, result)
        self._inputs = InputCopies()
        self._apart: dict[int, tuple[Tensor, list[Tensor]]] = {}

    def __bool__(self) -> bool:
        return bool(self.results)

    def unchanged(self, call: Call, *, maps: bool) -> None:
        """A call that was answered from the recording; with ``maps`` its text was the recorded one, too."""
        if not self.results:
            return
        recorded = self._recorded
        names = None if maps else call.executable.slot_names
        slots = [unchanged(recorded.slots, names) for _ in self.results]
        self._store(call, slots, recorded.maps if maps else ())

    def dense(self, call: Call, slots: Mapping[str, Tensor]) -> None:
        """A dense call: all of its slots, and its maps if it has any."""
        if not self.results:
            return
        recorded, program = self._recorded, call.executable.program
        each = self._values(call.executable, slots, whole=True)
        maps = recorded.maps if all(name in slots for name in recorded.maps) else ()
        self._store(call, [after_dense_call(program, recorded.slots, own) for own in each], maps)

    def sparse(
        self,
        call: Call,
        turn: Turn,
        outputs: list[Any],
        updates: Mapping[str, Tensor],
        own_sites: OwnSites | None,
        full: int | None = None,
    ) -> None:
        """A sparse call: what it changed of its slots.

        Args:
            call: the call.
            turn: the sites that it wrote.
            outputs: what the caller gets.
            updates: what the step returned besides, by slot.
            own_sites: what each copy may change, if that differs.
            full: of a shallow call, the number of the full call that it took values from.
        """
        if not self.results:
            return
        recorded, program = self._recorded, call.executable.program
        if own_sites is not None:
            # Outside its own mask a copy returns what was recorded, so that is what its recording says it returned.
            updates = {**updates, **pinned_updates(program, turn, outputs)}
        each = self._values(call.executable, updates, whole=False)
        earlier = [None if full is None else result.calls[full].slots for result in self.results]
        slots = [
            after_sparse_call(program, recorded.slots, turn, own, then) for own, then in zip(each, earlier, strict=True)
        ]
        self._store(call, slots, ())

    def finish(self) -> None:
        """The run has ended as it should."""
        for result in self.results:
            result.complete = True

    @property
    def _recorded(self) -> CallRecord:
        """The call that is being edited, as it was recorded."""
        return self.recording.calls[self.results[0].num_calls]

    def _values(
        self, executable: Executable, values: Mapping[str, Tensor], *, whole: bool
    ) -> Iterator[Mapping[str, Tensor]]:
        """The values of each copy: whole slots, or updates."""
        if self.copies == 1:
            yield values
            return
        axes, samples = executable.batch_axes[0 if whole else 1], self._recorded.batch
        for copy in range(self.copies):
            yield take_copy(values, axes, samples, self.copies, copy)

    def _store(self, call: Call, slots: list[SlotStore], maps: tuple[str, ...]) -> None:
        recorded = self._recorded
        inputs = self._inputs_of(call, recorded)
        for copy, (result, own) in enumerate(zip(self.results, slots, strict=True)):
            mine = {name: value if self.copies == 1 else each[copy] for name, (value, each) in inputs.items()}
            result.calls.append(replace(recorded, slots=own, inputs=mine, maps=maps))

    def _inputs_of(self, call: Call, recorded: CallRecord) -> dict[str, tuple[Tensor, list[Tensor]]]:
        """Copies of the call's inputs, each with the parts of it that are the copies' of the edit."""
        # The timestep is the recorded one, and reading it again could wait for the device.
        known = {name: recorded.inputs[name] for name in ("timestep",) if name in recorded.inputs}
        if recorded.timestep is None:
            known = {}
        number, slot = self.results[0].num_calls, call.executable.sample_slot
        kept = self._inputs.of(number, call.signature, call.tensors, slot, known, self.later)
        if self.copies == 1:
            return {name: (value, []) for name, value in kept.items()}
        batched = {spec.identifier() for spec in call.signature.tensors if spec.axes and spec.axes[0] == "b"}
        apart: dict[int, tuple[Tensor, list[Tensor]]] = {}
        found = {}
        for name, value in kept.items():
            parts = self._apart.get(id(value))
            if parts is None:
                own = take_copies(value, recorded.batch, self.copies) if name in batched else [value] * self.copies
                parts = (value, own)
            found[name] = apart[id(value)] = parts
        self._apart = apart  # equal inputs of calls that follow each other stay one tensor
        return found


def _settle_with(recording: Recording, result: Recording) -> None:
    """Settle a result when the recording that is edited is dropped: what is written down later refers to it until then.

    A base outlives most of its edits, so nothing is kept of one that is dropped before it.
    """
    settling = weakref.finalize(recording, _settle, weakref.ref(result, lambda _: settling.detach()))
    settling.atexit = False


def _settle(result: weakref.ref[Recording]) -> None:
    """Let go of the recording that was edited, which nobody else has any more.

    Not while this thread captures a CUDA graph, where garbage may be collected too: comparing sites waits for the
    device, which ends the capture. It is done when somebody asks for a slot, then.
    """
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return
    recording = result()
    for call in () if recording is None else recording.calls:
        call.slots.settle()
