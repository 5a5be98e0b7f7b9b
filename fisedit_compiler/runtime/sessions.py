"""The two modes of a compiled module: what happens to each call while recording and while editing.

A session sees one call at a time, counts them, checks them against the recording and decides how they run. It owns
no graph: running is ``executable.py``'s business, entering and leaving modes ``module.py``'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fisedit_compiler.config import SparsifyConfig
from fisedit_compiler.errors import RecordingError
from fisedit_compiler.inputs import CallSignature
from fisedit_compiler.masks import to_site_mask
from fisedit_compiler.runtime.executable import Executable
from fisedit_compiler.runtime.recording import CallRecord, Recording
from fisedit_compiler.runtime.site_plan import SitePlan

CallKind = Literal["dense", "sparse", "skipped"]


@dataclass(frozen=True)
class Call:
    """One call of the module, bound and flattened.

    Attributes:
        find_executable: finds or compiles the program for the signature; call ``executable`` instead.
        signature: what the program is compiled for.
        tensors: tensor arguments by placeholder name.
        run_original: runs the user's own module on the call's arguments.
    """

    find_executable: Callable[[], Executable]
    signature: CallSignature
    tensors: Mapping[str, Tensor]
    run_original: Any

    @cached_property
    def executable(self) -> Executable:
        """The program for the signature; on first use, so that a call that is refused compiles nothing."""
        return self.find_executable()

    @property
    def sample(self) -> Tensor:
        return self.tensors[self.signature.spatial.identifier()]

    @cached_property
    def timestep(self) -> float | None:
        """The timestep if it is one number; read once, because reading waits for the device."""
        value = self.tensors.get("timestep")
        return float(value) if value is not None and value.numel() == 1 else None

    @property
    def scalars(self) -> dict[str, float]:
        """Values of one-element arguments that were read already."""
        return {} if self.timestep is None else {"timestep": self.timestep}

    def store(self, slots: Mapping[str, Tensor]) -> CallRecord:
        batch, _, height, width = self.sample.shape
        return CallRecord(self.signature, batch, height, width, self.timestep, slots)


class Session(Protocol):
    """A mode: receives every call made while it is active."""

    def handle(self, call: Call) -> Any: ...


class RecordSession:
    """Runs calls densely and stores their slots."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording

    def handle(self, call: Call) -> Any:
        outputs, slots = call.executable.record(call.tensors)
        self.recording.calls.append(call.store(slots))
        return call.executable.assemble(outputs)


class EditSession:
    """Runs calls against a recording: densely until a mask is set, sparsely from then on.

    Attributes:
        recording: the base run.
        call: calls made so far.
        mask: bool ``[H, W]`` at the spatial input's resolution, or ``None`` while calls run densely.
        result: with ``record=True``, the edited run as a recording of its own.
        timings: kind and wall seconds of every call (on CUDA: of its launch).
    """

    def __init__(self, recording: Recording, config: SparsifyConfig, mask: Any = None, record: bool = False) -> None:
        self.recording, self.config = recording, config
        self.call = 0
        self.mask: Tensor | None = None
        self.plan: SitePlan | None = None
        self.result = Recording(recording.model, recording.config) if record else None
        self.timings: list[tuple[CallKind, float]] = []
        if mask is not None:
            self.set_mask(mask)

    def set_mask(self, mask: Any) -> None:
        """Edit sparsely from the next call on.

        Args:
            mask: what to change, as anything :func:`fisedit_compiler.masks.to_site_mask` accepts: bool or uint8 or
                float torch tensor or numpy array or PIL image or path, at latent resolution or a multiple of it.

        Raises:
            MaskError: its size, dtype or contents do not fit the recording.
        """
        self.mask = to_site_mask(mask, self.recording.height, self.recording.width, image_scale=None)
        self.plan = None

    def handle(self, call: Call) -> Any:
        base = self._base_of(call)
        start = time.perf_counter()
        kind, result = self._run(call, base)
        self.timings.append((kind, time.perf_counter() - start))
        self.call += 1
        return result

    def finish(self) -> None:
        """Check that the run made as many calls as the recording has.

        Raises:
            RecordingError: it made fewer.
        """
        if self.call < self.recording.num_calls:
            raise RecordingError(
                f"The edit ended after {self.call} calls, the recording has {self.recording.num_calls}: another number "
                "of inference steps or another guidance setting. Edit with the settings of the recorded run; the "
                "recording itself is untouched and can be used again."
            )
        if self.result is not None:
            self.result.complete = True

    def _run(self, call: Call, base: CallRecord) -> tuple[CallKind, Any]:
        executable = call.executable
        if self.mask is None:
            if self.result is None:
                return "dense", call.run_original()
            outputs, slots = executable.record(call.tensors)
            self._store(call, slots)
            return "dense", executable.assemble(outputs)
        if self.config.check_inputs:
            self._check_outside(call, base)
        if not bool(self.mask.any()):
            recorded = executable.base_outputs(base.slots)
            if recorded is not None:
                self._store(call, base.slots)
                return "skipped", executable.assemble(recorded)
        if self.plan is None:
            self.plan = executable.plan(self.mask, self.config.dilation, call.sample.device)
        update = self.result is not None
        outputs, slots = executable.step(call.tensors, base.slots, self.plan, update=update, scalars=call.scalars)
        self._store(call, slots)
        return "sparse", executable.assemble(outputs)

    def _store(self, call: Call, slots: Mapping[str, Tensor]) -> None:
        if self.result is not None:
            self.result.calls.append(call.store(slots))

    def _base_of(self, call: Call) -> CallRecord:
        """The recorded call this one corresponds to.

        Raises:
            RecordingError: the run differs from the recorded one; the message says in what.
        """
        if self.call >= self.recording.num_calls:
            raise RecordingError(
                f"This is call {self.call + 1} of the edit, but the recording has only {self.recording.num_calls}: "
                "more inference steps, or guidance in two calls instead of one batch. Edit with the recorded settings."
            )
        base = self.recording.calls[self.call]
        batch, _, height, width = call.sample.shape
        if (height, width) != (base.height, base.width):
            raise RecordingError(
                f"Call {self.call} has a {height}x{width} input, the recording {base.height}x{base.width}: edit at the "
                "recorded resolution, or record again at this one."
            )
        if batch != base.batch:
            raise RecordingError(
                f"Call {self.call} has batch {batch}, the recording {base.batch}: classifier-free guidance was "
                "switched on or off, or the number of images changed. Edit with the recorded guidance and batch."
            )
        if call.signature != base.signature:
            raise RecordingError(
                f"Call {self.call} passes other arguments than the recorded call "
                f"({_difference(call.signature, base.signature)}). Edit with the arguments of the recorded run."
            )
        if call.timestep != base.timestep:
            raise RecordingError(
                f"Call {self.call} is at timestep {call.timestep}, the recording at {base.timestep}: another scheduler "
                "or another number of inference steps. Edit with the recorded ones."
            )
        return base

    def _check_outside(self, call: Call, base: CallRecord) -> None:
        """Outside the mask the input must be the recorded one, bit for bit."""
        for slot in call.executable.program.slots:
            if slot.origin != call.executable.program.spatial[0] or slot.kind != "canvas":
                continue
            recorded = base.slots[slot.name]
            assert self.mask is not None
            keep = ~self._grown_mask().flatten().to(recorded.device)
            now = call.sample.flatten(2).transpose(1, 2)
            if not torch.equal(now[:, keep], recorded[:, keep]):
                raise RecordingError(
                    f"At call {self.call} the input differs from the recorded one outside the mask. The edit must "
                    "start from the recorded noise and follow the recorded run: the same seed (a fresh generator), "
                    "the same scheduler, the same guidance scale, and nothing that mixes all sites between two calls "
                    "(guidance_rescale, dynamic thresholding). SparsifyConfig(check_inputs=False) allows it."
                )

    def _grown_mask(self) -> Tensor:
        assert self.mask is not None
        if self.config.dilation == 0:
            return self.mask
        size = 2 * self.config.dilation + 1
        grown = torch.nn.functional.max_pool2d(
            self.mask[None, None].float(), size, stride=1, padding=self.config.dilation
        )
        return grown[0, 0] > 0


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
