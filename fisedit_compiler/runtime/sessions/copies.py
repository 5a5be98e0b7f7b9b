"""Several edits of one recording in one batch: its samples repeated, the sites of each, results taken apart.

Copies lie as diffusers lays out guidance: every recorded sample is repeated ``copies`` times in place, as
``torch.repeat_interleave`` does, so a recording of ``[uncond, cond]`` serves ``[uncond] * P + [cond] * P``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fisedit_compiler.geometry.site_plan import SitePlan
from fisedit_compiler.graph.layout import Layout
from fisedit_compiler.lowering.program import CompiledProgram
from fisedit_compiler.recordings.recording import CallRecord
from fisedit_compiler.recordings.stores.repeated import RepeatedSlots, repeat_samples
from fisedit_compiler.runtime.calls.call import Call
from fisedit_compiler.runtime.samples.sample_axes import BatchAxes


class OwnSites:
    """The sites that each copy may change, in the place of a plan whose sites all copies share."""

    def __init__(self, masks: Tensor, samples: int, program: CompiledProgram, device: Any) -> None:
        """``masks`` are bool ``[copies, H, W]``, ``samples`` the recorded ones, each of which is repeated."""
        self.samples = samples
        self.plans = [SitePlan.build(mask, program.levels, (), device=device) for mask in masks]
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


def repeated(call: Call, recorded: CallRecord, copies: int) -> CallRecord:
    """A recorded call as the calls of several edits see it: every sample, and every input of one, repeated."""
    if copies == 1:
        return recorded
    samples = recorded.batch
    slots = RepeatedSlots(recorded.slots, samples, copies, lambda: call.executable.batch_axes[0])
    batched = {spec.identifier() for spec in call.signature.tensors if spec.axes and spec.axes[0] == "b"}
    inputs = {
        name: repeat_samples(value, 0, samples, copies) if name in batched else value
        for name, value in recorded.inputs.items()
    }
    return replace(recorded, batch=samples * copies, slots=slots, inputs=inputs)


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
