"""Dense calls inside an edit: above the break-even, computing every site costs less than computing the active ones.

Such a call runs the original module, then overwrites its outputs outside the mask by the recorded ones, so what an
edit promises about the outside holds all the same. Inside it is the dense run's prediction, not the pinned program's:
nothing that was recorded takes part in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fisedit_compiler import masks
from fisedit_compiler.config import SparsifyConfig
from fisedit_compiler.geometry.break_even import break_even
from fisedit_compiler.geometry.site_plan import SitePlan
from fisedit_compiler.graph.layout import Layout
from fisedit_compiler.lowering.program import CompiledProgram
from fisedit_compiler.recordings.recording import CallRecord
from fisedit_compiler.runtime.calls.call import Call


def dense_reason(mask: Tensor, config: SparsifyConfig, device: str) -> str | None:
    """Why an edit with this mask runs its calls densely, as a sentence; ``None`` if it runs them sparsely.

    Args:
        mask: bool ``[H, W]`` at level 1, not yet grown by ``config.dilation``.
        config: whose ``dense_above`` is the limit, the measured break-even if that is ``None``.
        device: where the calls run, as ``str(torch.device)``.
    """
    return dense_reason_of_grown(masks.grown(mask, config.dilation), config, device)


def dense_reason_of_grown(mask: Tensor, config: SparsifyConfig, device: str) -> str | None:
    """The same for a mask that was grown already."""
    kind = torch.device(device).type
    backend = config.backend_on(kind)
    limit = break_even(kind, backend) if config.dense_above is None else config.dense_above
    if limit >= 1.0:
        return None
    area = masks.area(mask)
    if area <= limit:
        return None
    measured = f"the break-even of {limit:.1%} on {kind}/{backend}"
    limit_in_words = measured if config.dense_above is None else f"SparsifyConfig.dense_above={limit:.1%}"
    return f"{area:.1%} of the sites are active, above {limit_in_words}: calls run densely"


def pinning_plan(mask: Tensor, program: CompiledProgram, dilation: int, device: torch.device) -> SitePlan:
    """The active sites of every level, without the tables that only sparse calls read."""
    return SitePlan.build(mask, program.levels, (), dilation=dilation, device=device)


class Pinning(Protocol):
    """The sites whose outputs an edit may change: a plan, or one for each of several copies."""

    @property
    def is_full(self) -> bool: ...

    def selector(self, layout: Layout) -> Tensor: ...


def run_densely(
    call: Call, base: CallRecord, plan: Pinning, *, record: bool, compiled: bool = False
) -> tuple[Any, dict[str, Tensor]]:
    """One dense call whose outputs outside the plan's sites are the recorded ones, bit for bit.

    Outputs that are not spatial are the dense call's.

    Args:
        call: the call to make.
        base: the recorded call that it corresponds to.
        plan: says which sites may change; a full one changes nothing about the dense result.
        record: also return every slot. They are the dense call's; those of outputs hold what is returned.
        compiled: run compiled code, see ``Executable.expect_dense``.

    Returns:
        The model's own output structure, and the slots by name (none without ``record``).
    """
    executable = call.executable
    program = executable.program
    if record:
        flat, slots = executable.record(call.tensors, compiled=compiled)
        pinned = pin(flat, program, base.slots, plan)
        # The caller may write to what it gets, so the recording keeps a copy.
        for output, value in zip(program.outputs, pinned, strict=True):
            if output.slot is not None:
                slots[output.slot] = value.clone(memory_format=torch.contiguous_format)
        return executable.assemble(pinned), slots
    outputs = executable.outputs(call.tensors) if compiled else None
    if outputs is not None:
        return executable.assemble(pin(outputs, program, base.slots, plan)), {}
    flat, structure = pytree.tree_flatten(call.run_original())
    return pytree.tree_unflatten(pin(flat, program, base.slots, plan), structure), {}


def pin(flat: Sequence[Any], program: CompiledProgram, recorded: Mapping[str, Tensor], plan: Pinning) -> list[Any]:
    """Flat outputs with the recorded values at the sites that the plan leaves alone, bit for bit."""
    if plan.is_full:
        return list(flat)
    layouts = {slot.name: slot.layout for slot in program.slots}
    return [
        value if output.slot is None else torch.where(plan.selector(layouts[output.slot]), value, recorded[output.slot])
        for value, output in zip(flat, program.outputs, strict=True)
    ]
