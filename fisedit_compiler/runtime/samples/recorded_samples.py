"""Samples of a batch taken apart: which of a call's are recorded already, and how the others are computed alone.

At the first call of an edit both runs share their latents and the negative prompt, so with guidance one sample of the
two is recorded already.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING

import sympy
import torch
from torch import Tensor, fx

from fisedit_compiler.graph.batch_axes import mixed
from fisedit_compiler.graph.layout import image
from fisedit_compiler.graph.signatures import CallSignature
from fisedit_compiler.graph.sizes import BATCH
from fisedit_compiler.graph.specs import ValueSpec

if TYPE_CHECKING:
    from fisedit_compiler.recordings.recording import CallRecord
    from fisedit_compiler.slots.base import Slot

Comparison = tuple[list[bool], list[bool]]
"""Per sample, whether its spatial inputs, and whether all its inputs, are the recorded ones."""


def are_independent(graph: fx.Graph, signature: CallSignature) -> bool:
    """Whether nothing in a captured graph mixes the samples of a batch.

    No operation may, and every value that depends on the image must have the batch on its first axis alone, maybe times
    heads. Attention between frames, a batch cut into halves, or one that is rolled, has not.
    """
    if mixed(graph, signature) is not None:
        return False
    shapes = set()
    for node in graph.nodes:
        if node.meta.get("varies"):
            spec = node.meta.get("spec")
            shapes |= {s.shape for s in (spec if isinstance(spec, tuple) else (spec,)) if isinstance(s, ValueSpec)}
    return all(_is_by_sample(shape) for shape in shapes)


def are_first(slots: Iterable[Slot]) -> bool:
    """Whether the samples of all slots are first in what is stored, as they are first in the dense values."""
    found = (slot.batch_axes(0) for slot in slots)
    return all(axes is not None and axes[0] == 0 for axes in found)


def _is_by_sample(shape: tuple[sympy.Expr, ...]) -> bool:
    first, *others = (sympy.sympify(size) for size in shape or (1,))
    per_sample = first / BATCH
    return per_sample.is_integer is True and not any(size.has(BATCH) for size in (per_sample, *others))


def can_be_cut(signature: CallSignature, tensors: Mapping[str, Tensor], batch: int) -> bool:
    """Whether every tensor of a call has a batch axis or plainly has not.

    One whose first axis is a multiple of the batch without being it cannot be told.
    """
    for spec in signature.tensors:
        if spec.axes and spec.axes[0] != "b":
            first = tensors[spec.identifier()].shape[0]
            if first > 1 and first % batch == 0:
                return False
    return True


def cut(signature: CallSignature, tensors: Mapping[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    """Some samples of a call's tensors; what has no batch axis as it is.

    Args:
        signature: of the call.
        tensors: by placeholder name.
        index: int64 ``[n]``, on their device.
    """
    found = {}
    for spec in signature.tensors:
        value = tensors[spec.identifier()]
        found[spec.identifier()] = value.index_select(0, index) if spec.axes and spec.axes[0] == "b" else value
    return found


def compose(recorded: Tensor, computed: Tensor, index: Tensor, batch: int) -> Tensor:
    """A value of the whole batch: the recorded one with some samples computed anew.

    Args:
        recorded: ``[B * m, ...]``, left as it is.
        computed: ``[n * m, ...]``.
        index: int64 ``[n]``: the samples that were computed.
        batch: ``B``.
    """
    whole = recorded.clone()
    whole.unflatten(0, (batch, -1)).index_copy_(0, index, computed.unflatten(0, (index.shape[0], -1)))
    return whole


def compare(signature: CallSignature, tensors: Mapping[str, Tensor], base: CallRecord, slot: str | None) -> Comparison:
    """Which samples of a call are the recorded ones, bit for bit. Waits for the device, once.

    Args:
        signature: of the call and of the recorded one.
        tensors: of the call, by placeholder name.
        base: the recorded call.
        slot: name of the slot that holds the primary spatial input, if one does.
    """
    batch, device = base.batch, tensors[signature.spatial.identifier()].device
    spatial = torch.ones(batch, dtype=torch.bool, device=device)
    others = spatial.clone()
    for spec in signature.tensors:
        value, name = tensors[spec.identifier()], spec.identifier()
        recorded = base.inputs.get(name)
        if spec.name == signature.primary and slot is not None:
            value, recorded = image(Fraction(1)).packed.from_dense(value), base.slots[slot]
        if recorded is None or recorded.shape != value.shape:
            same = torch.zeros((), dtype=torch.bool, device=device)
        elif spec.axes and spec.axes[0] == "b":
            same = (value == recorded).flatten(1).all(1) if value.dim() > 1 else value == recorded
        else:
            same = (value == recorded).all()
        if spec.is_spatial:
            spatial &= same.to(device)
        else:
            others &= same.to(device)
    first, both = torch.stack([spatial, spatial & others]).tolist()
    return first, both
