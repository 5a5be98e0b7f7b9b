"""What one base run leaves behind: per call, every slot the sparse program loads. Held in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fisedit_compiler.errors import RecordingError
from fisedit_compiler.inputs import CallSignature


@dataclass(frozen=True)
class CallRecord:
    """One recorded UNet call.

    Attributes:
        signature: what the call's program was compiled for.
        batch: size of the batch (2 for guided sampling, 1 without guidance).
        height: rows of the spatial input.
        width: columns of the spatial input.
        timestep: the timestep as a float, ``None`` for models without one (or with one per sample).
        slots: recorded tensors by slot name.
        inputs: copies of the call's inputs without sites by placeholder name (``recorded_inputs.py``); calls with equal
            inputs share them.
        maps: names of the slots that are cross-attention maps, of the first calls only (``record(maps=...)``).
    """

    signature: CallSignature
    batch: int
    height: int
    width: int
    timestep: float | None
    slots: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    maps: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the call's slots."""
        return sum(tensor.nbytes for tensor in self.slots.values())


@dataclass
class Recording:
    """A base run, indexed by (call, slot). Made by ``compiled.record()`` or by an edit with ``record=True``.

    Attributes:
        model: fingerprint of the module that was recorded (structure and weights).
        config: the fields of the configuration that decide what is recorded.
        calls: one record per call, in order.
        complete: whether the recording run ended without an exception.
    """

    model: Any
    config: Mapping[str, Any]
    calls: list[CallRecord] = field(default_factory=list)
    complete: bool = False

    @property
    def num_calls(self) -> int:
        return len(self.calls)

    @property
    def num_maps(self) -> int:
        """Calls, from the first on, that have cross-attention maps (``record(maps=...)``)."""
        return sum(1 for call in self.calls if call.maps)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots of all calls (tensors shared with another recording are counted here too)."""
        return sum(call.nbytes for call in self.calls)

    @property
    def bytes_per_call(self) -> list[int]:
        """Bytes of every call, exactly the sum of its slots."""
        return [call.nbytes for call in self.calls]

    @property
    def input_nbytes(self) -> int:
        """Bytes of the inputs that are kept beside the slots, each tensor counted once however many calls share it."""
        tensors = {id(value): value for call in self.calls for value in call.inputs.values()}
        return sum(value.nbytes for value in tensors.values())

    @property
    def height(self) -> int:
        """Rows of the spatial input (latent height)."""
        return self._first().height

    @property
    def width(self) -> int:
        """Columns of the spatial input (latent width)."""
        return self._first().width

    @property
    def device(self) -> str:
        """Where it was recorded, as ``str(torch.device)``."""
        return self._first().signature.device

    def slot(self, call: int, name: str) -> Tensor:
        """One recorded tensor.

        Raises:
            RecordingError: there is no such call or slot.
        """
        if not 0 <= call < len(self.calls) or name not in self.calls[call].slots:
            raise RecordingError(f"The recording has no slot {name!r} at call {call}; it has {len(self.calls)} calls.")
        return self.calls[call].slots[name]

    def __iter__(self) -> Iterator[CallRecord]:
        return iter(self.calls)

    def __repr__(self) -> str:
        if not self.calls:
            return "Recording(empty)"
        state = "" if self.complete else ", interrupted"
        megabytes = self.nbytes / 2**20
        return (
            f"Recording({self.num_calls} calls of batch {self._first().batch} at {self.height}x{self.width}, "
            f"{len(self._first().slots)} slots, {megabytes:.1f} MiB{state})"
        )

    def _first(self) -> CallRecord:
        if not self.calls:
            raise RecordingError("The recording is empty: no call was made inside `with compiled.record()`.")
        return self.calls[0]
