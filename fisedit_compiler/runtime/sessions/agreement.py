"""Whether an edit follows its recording: as many calls, at the same timesteps, from the same inputs outside the mask.

Sizes and arguments are compared before a call runs. What is on the device is compared there, and judged when the
outcome is known (``deferred.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from fisedit_compiler.config import SparsifyConfig
from fisedit_compiler.errors import RecordingError
from fisedit_compiler.graph.layout import image
from fisedit_compiler.graph.signatures import CallSignature
from fisedit_compiler.recordings.finite import any_not_finite, edit_overflowed
from fisedit_compiler.recordings.recording import CallRecord, Recording
from fisedit_compiler.runtime.calls.call import Call
from fisedit_compiler.runtime.sessions.copies import repeated
from fisedit_compiler.runtime.sessions.modes import OTHER_THREADS
from fisedit_compiler.tensors.bits import differs
from fisedit_compiler.tensors.contents import Later
from fisedit_compiler.tensors.deferred import DeferredChecks

_PACKED = image(Fraction(1)).packed
"""The layout that inputs are recorded in."""
CHECKED_AT_ONCE = 2
"""Calls of a run whose inputs are checked before anything is launched: most mistakes show there."""


class Agreement:
    """Compares the calls of an edit, numbered from 0, with the recorded ones."""

    def __init__(
        self,
        recording: Recording,
        config: SparsifyConfig,
        copies: int,
        name_now: Callable[[str], str] = lambda structure: structure,
    ) -> None:
        """``copies`` is how many edits are made at once: a call has so many times the recorded batch.

        ``name_now`` tells the key of a structure whose key another run found to hold too much.
        """
        self.recording, self.config, self.copies, self._name_now = recording, config, copies, name_now
        self._deferred = DeferredChecks()
        self._structures = {call.structure for call in recording.calls}
        self._masks: Tensor | None = None
        self._outside: Tensor | None = None
        self._alike: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def set_masks(self, masks: Tensor) -> None:
        """Also compare inputs outside masks from now on: bool ``[copies, H, W]``, or ``[1, H, W]`` for all; grown."""
        self._masks, self._outside = masks, None

    def before(self, call: Call, number: int) -> CallRecord:
        """The recorded call that this one corresponds to, with every sample repeated for the copies.

        Raises:
            RecordingError: this call differs from it, or an earlier one did and it is known by now.
        """
        self._deferred.poll()
        base = repeated(call, self._base_of(call, number), self.copies)
        if _is_checked_at_once(call, number):
            self._compare(call, number, base)
            self._deferred.wait()
        return base

    def looks_first(self, number: int) -> bool:
        """Whether the module is looked at before a call is launched, not behind the launch, where it costs no time."""
        waits = torch.device(self.recording.device).type != "cuda"
        return waits or number < CHECKED_AT_ONCE or len(self._structures) > 1

    def weights(self, now: str, number: int) -> None:
        """Compare the module's weights with those that were recorded.

        Raises:
            RecordingError: they differ.
        """
        if now != self.recording.model.weights:
            raise RecordingError(
                f"The module's weights changed inside edit(), by call {number} (an adapter loaded, fused or removed, a "
                "parameter written to): the edit would mix two models. Put the weights back and edit again, or record "
                "the base run with the new ones; the recording itself is untouched."
            )

    def structure(self, call: Call, now: str, base: CallRecord, number: int) -> None:
        """Compare the module's structure with that of the recorded call.

        Raises:
            RecordingError: they differ, so that the recorded values are of another program.
        """
        then = base.structure
        if then and now and now != then and self._name_now(now) != (then := self._name_now(then)):
            places = call.differences(now, then)
            where = f" in {', '.join(places[:3])}" if places else ""
            raise RecordingError(
                f"At call {number} the module is not what it was at the recorded call{where}: a processor, an adapter, "
                "its scale, a hook or another attribute was changed inside this run or inside the recorded one. Let "
                "both runs change it at the same calls, or neither; the recording itself is untouched."
            )

    def later(self, call: Call, number: int) -> Later | None:
        """Where comparisons of a call's contents wait for :meth:`after`; ``None`` if they are made at once."""
        return None if _is_checked_at_once(call, number) else Later(alike=self._alike)

    def after(self, call: Call, number: int, base: CallRecord, outputs: Any, later: Later | None = None) -> None:
        """Compare what :meth:`before` did not wait for, and what was put into ``later``.

        Of the last call also whether ``outputs`` are numbers; a NaN stays, whichever call it came from.

        Raises:
            NonFiniteError: they are not.
            RecordingError: something differs.
        """
        if later is not None and later.pairs:
            later.defer(self._deferred, call.executable.hoisted.clear)
        if not _is_checked_at_once(call, number):
            self._compare(call, number, base)
        if number + 1 == self.recording.num_calls:
            wrong = any_not_finite(outputs)
            if wrong is not None:
                self._deferred.add(wrong, lambda: edit_overflowed(number))

    def finish(self, calls: int) -> None:
        """Check that all of ``calls`` fitted, and that they were as many as were recorded.

        Raises:
            RecordingError: they were fewer, or the inputs of one of them were others.
        """
        self._deferred.wait()
        if calls == 0 and self.recording.num_calls:
            raise RecordingError(
                "The edit ended after 0 calls: none that was not refused went through the compiled module inside `with "
                "compiled.edit(...)`. Set `pipe.unet = compiled` before running the pipeline inside the block. "
                f"{OTHER_THREADS}"
            )
        if calls < self.recording.num_calls and calls in self._starts():
            raise RecordingError(
                f"The edit ended after {calls} calls, but the recording holds {len(self._starts()) + 1} runs of "
                f"{self.recording.num_calls} calls in all. Record one run in a `with compiled.record()` block each, or "
                "make as many in the edit; the recording itself is untouched and can be used again."
            )
        if calls < self.recording.num_calls:
            raise RecordingError(
                f"The edit ended after {calls} calls, the recording has {self.recording.num_calls}: it was stopped "
                "before its last step (pipe._interrupt, set by a step callback or a stop button), or has another "
                "number of inference steps or another guidance setting. Edit with the settings of the recorded run, to "
                "its end; the recording itself is untouched and can be used again."
            )

    def _base_of(self, call: Call, number: int) -> CallRecord:
        """The recorded call this one corresponds to.

        Raises:
            RecordingError: the run differs from the recorded one; the message says in what.
        """
        if number >= self.recording.num_calls:
            self._deferred.wait()  # what differed before says more
            raise self._too_many(number, call.timestep)
        base = self.recording.calls[number]
        if not call.ambient.fits(base.ambient):
            raise RecordingError(
                f"Call {number} is made under {call.ambient.describe()}, the recording under "
                f"{base.ambient.describe()}: their values have other dtypes. Edit as the run was "
                "recorded, or record again."
            )
        batch, _, height, width = call.sample.shape
        if (height, width) != (base.height, base.width):
            raise RecordingError(
                f"Call {number} has a {height}x{width} input, the recording {base.height}x{base.width}: edit at the "
                "recorded resolution, or record again at this one."
            )
        if batch != base.batch * self.copies and self.copies > 1:
            raise RecordingError(
                f"Call {number} has batch {batch}, not {base.batch * self.copies}, the recorded {base.batch} times "
                f"copies={self.copies}. Pass {self.copies} prompts (and guidance as recorded), or edit with the number "
                "of copies that the pipeline makes."
            )
        if batch != base.batch * self.copies:
            raise RecordingError(
                f"Call {number} has batch {batch}, the recording {base.batch}: classifier-free guidance was "
                "switched on or off, or the number of images changed. Edit with the recorded guidance and batch."
            )
        if call.signature is not base.signature and call.signature != base.signature:
            raise RecordingError(
                f"Call {number} passes other arguments than the recorded call "
                f"({_difference(call.signature, base.signature)}). Edit with the arguments of the recorded run."
            )
        self.structure(call, call.structure, base, number)
        return base

    def _starts(self) -> list[int]:
        """Calls at which a recording of several runs begins another one."""
        times = [call.timestep for call in self.recording.calls]
        return [
            number
            for number in range(1, len(times))
            if times[number] is not None and times[number] == times[0] != times[number - 1]
        ]

    def _too_many(self, number: int, timestep: float | None) -> RecordingError:
        timesteps = [call.timestep for call in self.recording.calls]
        why = "more inference steps, or guidance in two calls instead of one batch. Edit with the recorded settings."
        if len(timesteps) > 1 and timesteps[0] is not None and timestep == timesteps[0] != timesteps[-1]:
            why = (
                "it begins at the first timestep again. A block is one run: enter `with compiled.edit(...)` anew for "
                "each prompt, or make several edits in one run with copies=."
            )
        elif len(timesteps) > 1 and None not in timesteps:
            # Another number of steps would have shown at the second timestep.
            why = (
                f"all timesteps so far, down to {timesteps[-1]:g}, were the recorded ones, so the recorded run was "
                "most likely stopped before its last step (pipe._interrupt, set by a step callback or a stop button). "
                "Record it again, to its end; otherwise edit with the recorded settings."
            )
        return RecordingError(
            f"This is call {number + 1} of the edit, but the recording has only {self.recording.num_calls}: {why}"
        )

    def _compare(self, call: Call, number: int, base: CallRecord) -> None:
        """Compare what is on the device: the timestep, and the input outside the mask.

        Raises:
            RecordingError: one of them is not the recorded one; on a GPU raised later, when the outcome has arrived.
        """
        if base.timestep is not None:

            def other_timestep() -> RecordingError:
                return RecordingError(
                    f"Call {number} is at timestep {call.timestep}, the recording at {base.timestep}: another "
                    "scheduler or another number of inference steps. Edit with the recorded ones."
                )

            self._deferred.add(call.tensors["timestep"] != base.timestep, other_timestep)
        slot = None if self._masks is None or not self.config.check_inputs else call.executable.sample_slot
        if slot is not None:
            recorded = base.slots[slot]
            outside = self._outside_masks(number, recorded.device)
            wrong = differs(_PACKED.from_dense(call.sample), recorded) & outside

            def other_input() -> RecordingError:
                if bool(any_not_finite(call.sample)):
                    return edit_overflowed(number)
                return RecordingError(
                    f"At call {number} the input differs from the recorded one outside the mask. The edit must "
                    "start from the recorded noise and follow the recorded run: the same seed (a fresh generator), "
                    "the same scheduler, the same guidance scale, noise from the generator only "
                    "(DPMSolverSDEScheduler: set noise_sampler_seed), and nothing that mixes all sites between two "
                    "calls (guidance_rescale, dynamic thresholding). SparsifyConfig(check_inputs=False) allows it."
                )

            self._deferred.add(wrong.any(), other_input)

    def _outside_masks(self, number: int, device: torch.device) -> Tensor:
        """bool ``[1, S, 1]`` on ``device``, or ``[batch, S, 1]``: the sites an edit must not have touched."""
        assert self._masks is not None
        if self._outside is None:
            self._outside = ~self._masks.flatten(1)[..., None].to(device)
        one_for_all = len(self._masks) == 1
        return self._outside if one_for_all else self._outside.repeat(self.recording.calls[number].batch, 1, 1)


def _is_checked_at_once(call: Call, number: int) -> bool:
    # Waiting for the device would leave a GPU idle between two calls, so only the first calls are judged before they
    # run, the others when the outcome arrives.
    return number < CHECKED_AT_ONCE or not call.sample.is_cuda


def _difference(now: CallSignature, then: CallSignature) -> str:
    tensors_now = {spec.name: spec for spec in now.tensors}
    tensors_then = {spec.name: spec for spec in then.tensors}
    parts = [
        f"{name}: {tensors_now.get(name, 'absent')} instead of {tensors_then.get(name, 'absent')}"
        for name in sorted(tensors_now.keys() | tensors_then.keys())
        if tensors_now.get(name) != tensors_then.get(name)
    ]
    parts += [f"{a} instead of {b}" for a, b in zip(now.constants, then.constants, strict=False) if a != b]
    if now.device != then.device:
        parts.append(f"device {now.device} instead of {then.device}")
    return "; ".join(parts) or "other arguments"
