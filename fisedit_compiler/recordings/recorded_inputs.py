"""What a recording keeps of a call's inputs: copies of those without sites, stored once while they stay the same.

They tell later which samples of a dense call are recorded already (``samples.py``). Of spatial inputs that no slot
holds (a ControlNet's residuals) copies are kept for the first calls only: latents part after that.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fisedit_compiler.graph.signatures import CallSignature
from fisedit_compiler.tensors.contents import ContentNumbers, Later

FIRST_CALLS = 2
"""Calls of a run whose spatial inputs are copied; two, because guidance may come in two calls of the same latents."""
_KEPT = 2


class InputCopies:
    """Copies of the inputs of one run's calls; equal ones of calls that follow each other are one tensor.

    Whoever passed a tensor may write to it afterwards. A copy shares its memory with nobody else.
    """

    def __init__(self) -> None:
        self._numbers = ContentNumbers()

    def of(
        self,
        call: int,
        signature: CallSignature,
        tensors: Mapping[str, Tensor],
        slot_of_sample: str | None,
        known: Mapping[str, Tensor] | None = None,
        later: Later | None = None,
    ) -> dict[str, Tensor]:
        """The inputs to keep of one call, by placeholder name.

        Args:
            call: how many calls of the run came before.
            signature: of the call.
            tensors: its tensors by placeholder name.
            slot_of_sample: the slot that holds the primary spatial input, if one does.
            known: copies that exist already, such as the timestep of the recorded call that this one repeats.
            later: takes the comparisons that a CUDA device need not be waited for.
        """
        kept = dict(known or {})
        for spec in signature.tensors:
            name = spec.identifier()
            if name in kept:
                continue
            if spec.is_spatial:
                if call < FIRST_CALLS and not (spec.name == signature.primary and slot_of_sample is not None):
                    kept[name] = _copy(tensors[name])
                continue
            kept[name] = self._numbers.copy_of(name, tensors[name], _KEPT, later)
        return kept


def _copy(value: Tensor) -> Tensor:
    return value.clone(memory_format=torch.contiguous_format)
