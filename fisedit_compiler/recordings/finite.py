"""Values that are no numbers any more: what a run overflowed in, and what to do about it."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fisedit_compiler.errors import NonFiniteError
from fisedit_compiler.recordings.recording import Recording

logger = logging.getLogger(__name__)

REMEDY = (
    "In half precision that is nearly always an overflow: run the model in another type (pipe.to(torch.bfloat16), or "
    "torch.float32), keep the part that overflows in float32 (a VAE: vae.to(torch.float32), or one made for float16), "
    "or lower the guidance scale"
)


def any_not_finite(values: Any) -> Tensor | None:
    """Whether a floating point tensor in ``values`` (nested) holds NaN or infinity: one bool, on the device."""
    tensors = [value for value in tree_leaves(values) if isinstance(value, Tensor) and value.is_floating_point()]
    flags = [~torch.isfinite(value).all() for value in tensors]
    return torch.stack(flags).any() if flags else None


class FiniteWatch:
    """Looks at the outputs of every call of a run. Nothing is waited for before the run has ended."""

    def __init__(self) -> None:
        self._flags: list[Tensor | None] = []

    def look(self, outputs: Any) -> None:
        """Note the outputs of the next call."""
        self._flags.append(any_not_finite(outputs))

    def first(self) -> int | None:
        """The first call with a NaN or infinity in its outputs; waits for the device once."""
        numbers = [number for number, flag in enumerate(self._flags) if flag is not None]
        found = torch.stack([flag for flag in self._flags if flag is not None]).tolist() if numbers else []
        return next((number for number, wrong in zip(numbers, found, strict=True) if wrong), None)


def note_not_finite(recording: Recording, watch: FiniteWatch) -> None:
    """Say so at the end of a recorded run. Its picture is the user's to judge; edits of it are refused."""
    recording.not_finite = watch.first()
    if recording.not_finite is not None:
        logger.warning(_found(recording))


def check_finite(recording: Recording) -> None:
    """Refuse a recording whose values are no numbers.

    Raises:
        NonFiniteError: names the first call, and what to do.
    """
    if recording.not_finite is not None:
        raise NonFiniteError(f"{_found(recording)}; then record the base run again.")


def edit_overflowed(call: int) -> NonFiniteError:
    """The error of an edit that made NaN or infinity of a recording without."""
    return NonFiniteError(
        f"By call {call} the edit's own values hold NaN or infinity; the recording's do not. {REMEDY}. The recording "
        "is untouched and can be used again, with another prompt or a smaller change."
    )


def _found(recording: Recording) -> str:
    return (
        f"The recorded run has NaN or infinity in the outputs of call {recording.not_finite} (of "
        f"{recording.num_calls}), so no edit of it can be right. {REMEDY}"
    )
