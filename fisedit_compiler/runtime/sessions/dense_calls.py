"""Dense calls of an edit that has no mask yet: how much of one is computed, and with whose cross-attention maps.

Samples whose inputs are the recorded ones bit for bit take the recorded output; the module runs on the others only.
Where the recorded call has cross-attention maps and the user said which columns to reuse, the call runs as the
program's reuse graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fisedit_compiler.errors import ConfigError, RecordingError
from fisedit_compiler.runtime.samples.recorded_samples import can_be_cut, compare, compose, cut

if TYPE_CHECKING:
    from fisedit_compiler.recordings.recording import CallRecord, Recording
    from fisedit_compiler.runtime.calls.call import Call


@dataclass(frozen=True)
class DenseCall:
    """One call as it ran.

    Attributes:
        kind: ``"skipped"`` if every sample was recorded.
        result: the model's own output structure.
        slots: with ``record``, every slot of the whole batch, and its maps if the recorded call has any.
        samples: how many of the batch were computed.
        reused: whether columns of recorded maps took part.
    """

    kind: Literal["dense", "skipped"]
    result: Any
    slots: Mapping[str, Tensor]
    samples: int
    reused: bool


class DenseCalls:
    """The dense calls of one edit, in order.

    Attributes:
        columns: int64 ``[T]`` or ``[B, T]`` on the CPU, or ``None`` while every token has its own column.
    """

    def __init__(self, recording: Recording, skip: bool, copies: int = 1) -> None:
        """``skip``: take recorded outputs where the inputs are the recorded ones. ``copies``: edits made at once."""
        self.recording, self.copies = recording, copies
        self.columns: Tensor | None = None
        # Latents that left the base's do not come back to it, so nothing is compared afterwards: on a GPU that would
        # wait for the device at every call.
        self._follows = skip
        self._on_device: Tensor | None = None
        self._compiled: bool | None = None

    def reuse(self, columns: Tensor | None) -> None:
        """See :meth:`EditSession.reuse_maps`."""
        self.columns = None if columns is None else _checked(columns, self.recording, self.copies)
        self._on_device = None

    def run(self, call: Call, base: CallRecord, *, record: bool) -> DenseCall:
        """Run one call.

        Args:
            call: the call to make.
            base: the recorded call that it corresponds to.
            record: also return every slot.

        Raises:
            ConfigError: the columns are not those of the call's text.
        """
        executable, batch = call.executable, base.batch
        columns = self._columns_of(call, base)
        changed = self._changed(call, base)
        recorded = executable.base_outputs(base.slots) if len(changed) < batch else None
        if recorded is not None and not changed:
            return DenseCall("skipped", executable.assemble(recorded), base.slots if record else {}, 0, False)
        if recorded is None:
            return self._whole(call, base, columns, record)
        index = torch.tensor(changed, device=call.sample.device)
        tensors = cut(call.signature, call.tensors, index)
        some = None if columns is None else columns.index_select(0, index)
        slots: dict[str, Tensor] = {}
        if some is not None:
            maps = {name: base.slots[name].index_select(0, index) for name in base.maps}
            outputs, slots = executable.reuse(tensors, maps, some, record=record)
        elif record:
            outputs, slots = executable.record(tensors, maps=bool(base.maps))
        else:
            assert call.run_part is not None  # _changed() names all samples otherwise
            outputs = pytree.tree_leaves(call.run_part(index))
        outputs = [compose(of_base, part, index, batch) for of_base, part in zip(recorded, outputs, strict=True)]
        slots = {name: compose(base.slots[name], part, index, batch) for name, part in slots.items()}
        return DenseCall("dense", executable.assemble(outputs), slots, len(changed), some is not None)

    def _whole(self, call: Call, base: CallRecord, columns: Tensor | None, record: bool) -> DenseCall:
        executable = call.executable
        if columns is not None:
            outputs, slots = executable.reuse(call.tensors, base.slots, columns, record=record)
        elif record:
            outputs, slots = executable.record(call.tensors, maps=bool(base.maps), compiled=self._is_compiled(call))
        else:
            found = executable.outputs(call.tensors) if self._is_compiled(call) else None
            result = call.run_original() if found is None else executable.assemble(found)
            return DenseCall("dense", result, {}, base.batch, False)
        return DenseCall("dense", executable.assemble(outputs), slots, base.batch, columns is not None)

    def _changed(self, call: Call, base: CallRecord) -> list[int]:
        """The samples that have to be computed."""
        everything = list(range(base.batch))
        executable = call.executable
        if not self._follows or any(output.slot is None for output in executable.program.outputs):
            return everything
        spatial, same = compare(call.signature, call.tensors, base, executable.sample_slot)
        self._follows = all(spatial)
        if self.columns is not None and base.maps:
            # The recorded output is that of the recorded columns: nothing else may stand in their place.
            own = (self.columns < 0) | (self.columns == torch.arange(self.columns.shape[-1], device="cpu"))
            rows = own.all(-1).expand(base.batch).tolist()
            same = [recorded and unmoved for recorded, unmoved in zip(same, rows, strict=True)]
        changed = [sample for sample, recorded in enumerate(same) if not recorded]
        if not changed:
            return changed
        if self.columns is None and self._is_compiled(call):
            return everything  # a part of the batch would be another compilation
        return changed if self._can_be_cut(call) else everything

    def _is_compiled(self, call: Call) -> bool:
        """Whether whole calls are compiled: where a run before left the code, as the first call found it."""
        if self._compiled is None:
            self._compiled = call.executable.knows_dense(call.tensors)
        return self._compiled

    def _can_be_cut(self, call: Call) -> bool:
        fits = can_be_cut(call.signature, call.tensors, call.sample.shape[0])
        return fits and call.run_part is not None and call.executable.independent_samples

    def _columns_of(self, call: Call, base: CallRecord) -> Tensor | None:
        """The columns for every sample, int64 ``[B, T]`` where the call runs; ``None`` if nothing is reused."""
        if self.columns is None or not base.maps:
            return None
        length = call.executable.text_length(call.tensors)
        if self.columns.shape[-1] != length:
            raise ConfigError(
                f"reuse_maps() was given columns for {self.columns.shape[-1]} tokens, but the text of this call has "
                f"{length}: pass one column for every token of the edited prompt, padding included "
                "(pipelines.editing.words.token_columns(..., length=...))."
            )
        if self._on_device is None:
            self._on_device = self.columns.expand(base.batch, length).contiguous().to(call.sample.device)
        return self._on_device


def _checked(columns: Any, recording: Recording, copies: int) -> Tensor:
    """Columns that fit a recording, as a tensor of their own on the CPU.

    Raises:
        ConfigError: they have another dtype or shape, or name a token that the base's text does not have.
        RecordingError: no call of the recording has maps.
    """
    base = next((call for call in recording if call.maps), None)
    if base is None:
        raise RecordingError(
            "The recording has no cross-attention maps to reuse. Record the base run with them: "
            "compiled.record(maps=4) keeps those of the first four calls."
        )
    if not isinstance(columns, Tensor):
        columns = torch.as_tensor(columns)
    if columns.dtype != torch.int64:
        raise ConfigError(
            f"reuse_maps() was given columns of {columns.dtype}: pass int64, for every token the place of its column "
            "in the base's map, or -1 for its own."
        )
    if columns.dim() not in (1, 2) or (columns.dim() == 2 and columns.shape[0] != base.batch * copies):
        raise ConfigError(
            f"reuse_maps() was given columns of shape {list(columns.shape)}: pass [T], the same for every sample, or "
            f"[{base.batch * copies}, T], a row for each sample of the batch."
        )
    tokens = base.slots[base.maps[0]].shape[-1]
    wrong = columns[(columns < -1) | (columns >= tokens)]
    if wrong.numel():
        raise ConfigError(
            f"reuse_maps() was given column {int(wrong[0])}: the base's text has {tokens} tokens, so columns are from "
            f"0 to {tokens - 1}, or -1 for the token's own."
        )
    return columns.detach().cpu().clone()
