"""What a run leaves behind: per call, every slot the sparse program loads, in a store (``stores/store.py``).

That of an edit holds what the edit wrote and shares the rest with the recording it was made from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fisedit_compiler.capture.ambient import PLAIN, Ambient
from fisedit_compiler.errors import RecordingError
from fisedit_compiler.graph.signatures import CallSignature
from fisedit_compiler.recordings.stores import SlotStore


@dataclass(frozen=True)
class CallRecord:
    """One recorded UNet call.

    Attributes:
        signature: what the call's program was compiled for.
        batch: size of the batch (2 for guided sampling, 1 without guidance).
        height: rows of the spatial input.
        width: columns of the spatial input.
        timestep: the timestep as a float, ``None`` for models without one (or with one per sample).
        slots: holds the recorded tensors, by slot name; of an edited call a view that puts them together when they are
            read.
        inputs: copies of the call's inputs without sites by placeholder name (``recorded_inputs.py``); calls with equal
            inputs share them.
        structure: key of the module's structure at this call, which a pipeline may change within its own run.
        maps: names of the slots that are cross-attention maps, of the first calls only (``record(maps=...)``).
        ambient: the state that the call was made in (autocast, default dtype).
        movement: how far what comes up from coarser levels was from that of the call before, relative to its norm, as
            a scalar tensor; ``None`` at the first call and where there is no such place. Edits keep their base's.
    """

    signature: CallSignature
    batch: int
    height: int
    width: int
    timestep: float | None
    slots: SlotStore
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    maps: tuple[str, ...] = ()
    structure: str = ""
    ambient: Ambient = PLAIN
    movement: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes that the call keeps in memory, those it shares with other recordings included."""
        return self.slots.nbytes

    @property
    def own_nbytes(self) -> int:
        """Bytes that this call added: of an edited call what the edit wrote, of a base call all of it."""
        return self.slots.own_nbytes


@dataclass
class Recording:
    """A base run, indexed by (call, slot). Made by ``compiled.record()`` or by an edit with ``record=True``.

    Attributes:
        model: key of the module that was recorded (structure and weights), as it was when the run began.
        config: the fields of the configuration that decide what is recorded.
        calls: one record per call, in order.
        complete: whether the recording run ended without an exception.
        not_finite: the first call whose outputs hold NaN or infinity, if one does; such a run cannot be edited.
    """

    model: Any
    config: Mapping[str, Any]
    calls: list[CallRecord] = field(default_factory=list)
    complete: bool = False
    not_finite: int | None = None

    @property
    def num_calls(self) -> int:
        return len(self.calls)

    @property
    def num_maps(self) -> int:
        """Calls, from the first on, that have cross-attention maps (``record(maps=...)``)."""
        return sum(1 for call in self.calls if call.maps)

    @property
    def nbytes(self) -> int:
        """Bytes that the recording keeps in memory, those it shares with other recordings included."""
        return sum(self.bytes_per_call)

    @property
    def bytes_per_call(self) -> list[int]:
        """The same of every call; of a base run exactly the sum of its slots."""
        return [call.nbytes for call in self.calls]

    @property
    def input_nbytes(self) -> int:
        """Bytes of the inputs that are kept beside the slots, each tensor counted once however many calls share it."""
        tensors = {id(value): value for call in self.calls for value in call.inputs.values()}
        return sum(value.nbytes for value in tensors.values())

    @property
    def own_nbytes(self) -> int:
        """Bytes that this recording added: of an edit what it wrote, of a base run all of it.

        So the recordings of a base run and of all edits of it, and of their edits, take the sum of this. (A few
        integers per active site, shared by all calls of a turn, are not counted.)
        """
        return sum(self.own_bytes_per_call)

    @property
    def own_bytes_per_call(self) -> list[int]:
        """The same of every call."""
        return [call.own_nbytes for call in self.calls]

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
        return self.calls[call].slots.read(name)

    def __iter__(self) -> Iterator[CallRecord]:
        return iter(self.calls)

    def __repr__(self) -> str:
        if not self.calls:
            return "Recording(empty)"
        state = "" if self.complete else ", interrupted"
        own, total = self.own_nbytes / 2**20, self.nbytes / 2**20
        size = f"{total:.1f} MiB" if own == total else f"{own:.1f} MiB of its own, {total:.1f} MiB with what it shares"
        return (
            f"Recording({self.num_calls} calls of batch {self._first().batch} at {self.height}x{self.width}, "
            f"{len(self._first().slots)} slots, {size}{state})"
        )

    def _first(self) -> CallRecord:
        if not self.calls:
            raise RecordingError("The recording is empty: no call was made inside `with compiled.record()`.")
        return self.calls[0]
