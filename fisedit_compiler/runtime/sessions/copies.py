"""Several edits of one recording in one batch: its samples repeated, a mask for all or one each, results taken apart.

Copies lie as diffusers lays out guidance: every recorded sample is repeated ``copies`` times in place, as
``torch.repeat_interleave`` does, so a recording of ``[uncond, cond]`` serves ``[uncond] * P + [cond] * P``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisedit_compiler.errors import MaskError
from fisedit_compiler.geometry.site_plan import SitePlan
from fisedit_compiler.graph.layout import Layout
from fisedit_compiler.lowering.program import CompiledProgram
from fisedit_compiler.masks import to_site_mask
from fisedit_compiler.recordings.recording import CallRecord
from fisedit_compiler.recordings.slot_table import LazySlots, SlotTable
from fisedit_compiler.runtime.calls.call import Call
from fisedit_compiler.runtime.execution.sample_axes import BatchAxes

# -- masks -----------------------------------------------------------------------------------------------------------


def masks_of_copies(mask: Any, copies: int, height: int, width: int) -> tuple[Tensor, Tensor | None]:
    """The union of all masks, bool ``[H, W]``, and the mask of each copy, bool ``[copies, H, W]``.

    The second is ``None`` if all copies have the same mask.

    Args:
        mask: one mask, or a sequence or a stack ``[copies, H, W]`` of them, each as ``to_site_mask`` takes it.
        copies: how many edits are made at once.
        height: rows of the latent.
        width: columns of the latent.

    Raises:
        MaskError: a mask does not fit, or there are neither one nor ``copies`` of them.
    """
    each = _each(mask, copies)
    if each is None:
        # A mask that fits comes back as it is; whoever passed it may write to it afterwards.
        return to_site_mask(mask, height, width, image_scale=None).clone(), None
    if len(each) != copies:
        raise MaskError(
            f"{len(each)} masks were given for {copies} {'copy' if copies == 1 else 'copies'} of the recording; pass "
            "one mask for all of them, or one for each"
        )
    own = torch.stack([to_site_mask(one, height, width, image_scale=None).cpu() for one in each])
    union = own.any(dim=0)
    return union, None if bool((own == union).all()) else own


def _each(mask: Any, copies: int) -> Sequence[Any] | None:
    """The masks one by one if several were given."""
    if isinstance(mask, (list, tuple)):
        return mask if copies > 1 or len(mask) == 1 else None
    if isinstance(mask, (Tensor, np.ndarray)) and copies > 1:
        stacked = mask.ndim == 3 or (mask.ndim == 4 and mask.shape[1] == 1)
        if stacked and mask.shape[0] != 1:
            return list(mask)
    return None


class OwnSites:
    """The sites that each copy may change, in the place of a plan whose sites all copies share."""

    def __init__(self, masks: Tensor, samples: int, program: CompiledProgram, dilation: int, device: Any) -> None:
        """``masks`` are bool ``[copies, H, W]``, ``samples`` the recorded ones, each of which is repeated."""
        self.samples = samples
        self.plans = [SitePlan.build(mask, program.levels, (), dilation=dilation, device=device) for mask in masks]
        self._selectors: dict[Layout, Tensor] = {}

    @property
    def is_full(self) -> bool:
        """Whether every copy may change everything."""
        return all(plan.is_full for plan in self.plans)

    def selector(self, layout: Layout) -> Tensor:
        """bool tensor that broadcasts against a dense map or tokens of ``layout``, whose first axis is the batch."""
        if layout not in self._selectors:
            each = torch.cat([plan.selector(layout) for plan in self.plans])
            self._selectors[layout] = each.repeat(self.samples, *[1] * (layout.rank - 1))
        return self._selectors[layout]


# -- slots -----------------------------------------------------------------------------------------------------------


class RepeatedSlots(LazySlots):
    """The slots of a recorded call with every sample repeated; a slot is repeated when it is read."""

    def __init__(
        self, base: Mapping[str, Tensor], samples: int, copies: int, axes: Callable[[], tuple[BatchAxes, BatchAxes]]
    ) -> None:
        """``samples`` is the recorded batch; ``axes`` gives what :func:`batch_axes` does, when it is needed."""
        self.base, self.samples, self.copies, self._axes = base, samples, copies, axes

    def __getitem__(self, name: str) -> Tensor:
        # Cross-attention maps are no slots of the program; their batch comes first.
        value, axis = self.base[name], self._axes()[0].get(name, 0)
        return value if axis is None else _repeat(value, axis, self.samples, self.copies)

    def __contains__(self, name: object) -> bool:
        return name in self.base

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)

    def table(self) -> SlotTable:
        """All slots, repeated, at once."""
        return SlotTable(self)


def repeated(call: Call, recorded: CallRecord, copies: int) -> CallRecord:
    """A recorded call as the calls of several edits see it: every sample, and every input of one, repeated."""
    if copies == 1:
        return recorded
    samples = recorded.batch
    slots = RepeatedSlots(recorded.slots, samples, copies, lambda: call.executable.batch_axes)
    batched = {spec.identifier() for spec in call.signature.tensors if spec.axes and spec.axes[0] == "b"}
    inputs = {
        name: _repeat(value, 0, samples, copies) if name in batched else value
        for name, value in recorded.inputs.items()
    }
    return replace(recorded, batch=samples * copies, slots=slots, inputs=inputs)


def _repeat(value: Tensor, axis: int, samples: int, copies: int) -> Tensor:
    return value.unflatten(axis, (samples, -1)).repeat_interleave(copies, axis).flatten(axis, axis + 1)


def take_copies(value: Tensor, samples: int, copies: int) -> list[Tensor]:
    """What belongs to each copy of a value whose first axis is the batch, as tensors of their own."""
    apart = value.unflatten(0, (samples, copies, -1))
    return [apart[:, copy].flatten(0, 1).clone(memory_format=torch.contiguous_format) for copy in range(copies)]


def take_copy(values: Mapping[str, Tensor], axes: BatchAxes, samples: int, copies: int, copy: int) -> dict[str, Tensor]:
    """What belongs to one copy, as tensors of its own: with the others dropped their memory is free."""
    taken = {}
    for name, value in values.items():
        axis = axes.get(name, 0)  # of cross-attention maps, which are no slots of the program, the first
        if axis is not None:
            value = value.unflatten(axis, (samples, copies, -1)).select(axis + 1, copy).flatten(axis, axis + 1)
        taken[name] = value.clone(memory_format=torch.contiguous_format)
    return taken
