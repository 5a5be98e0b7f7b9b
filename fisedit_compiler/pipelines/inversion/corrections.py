"""Corrections: how a run is made to pass through given latents, and an edit to deviate from them.

A picture that no run made has no run that ends in it. One is made of a path, latents of the picture at every noise
level: after each step the scheduler's result is replaced by the path's next point, and the difference is kept. A run
under another prompt adds the same differences after its own steps, so it leaves the picture only as far as its
predictions leave the base's. The same is done by the noise maps of edit-friendly DDPM inversion (Huberman-Spiegelglas
et al., "An Edit Friendly DDPM Noise Space", CVPR 2024) and, for DDIM's path, by the distances of direct inversion (Ju
et al., "PnP Inversion", ICLR 2024). It asks nothing of the scheduler but that the same inputs give the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fisedit_compiler.errors import RecordingError
from fisedit_compiler.pipelines.callbacks import StepCallback, Tensors


@dataclass(frozen=True, eq=False)
class Corrections:
    """Where a run starts, and what is added to the latents after each of its steps.

    Attributes:
        start: ``[1, C, H, W]``, given to the pipeline as ``latents``; it scales them as it scales noise.
        steps: per step ``[1, C, H, W]`` in a wider type than the latents', so that adding one to the same result
            gives the same latents; empty for a run that starts at ``start`` and goes its own way.
    """

    start: torch.Tensor = field(repr=False)
    steps: Sequence[torch.Tensor] = field(default=(), repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return self.start.nbytes + sum(step.nbytes for step in self.steps)

    def uncorrected(self) -> Corrections:
        """The same start without corrections."""
        return Corrections(self.start)

    def before(self, callback: StepCallback) -> StepCallback:
        """``callback``, seeing the latents after they were corrected."""
        if not self.steps:
            return callback

        def corrected(pipe: Any, step: int, timestep: Any, tensors: Tensors) -> Tensors:
            if step >= len(self.steps):
                raise RecordingError(
                    f"the pipeline makes step {step + 1}, but the picture was loaded for {len(self.steps)}; put the "
                    "scheduler it was loaded with back"
                )
            return callback(pipe, step, timestep, {**tensors, "latents": add(tensors["latents"], self.steps[step])})

        return corrected


class FollowPath:
    """Replaces the latents after every step by those of a path, and keeps what that took.

    Args:
        path: latents after every step, each ``[1, C, H, W]``.
        callback: sees the latents afterwards.
    """

    def __init__(self, path: Sequence[torch.Tensor], callback: StepCallback) -> None:
        self.steps: list[torch.Tensor] = []
        self._path = path
        self._callback = callback

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: Tensors) -> Tensors:
        latents = tensors["latents"]
        self.steps.append(_wide(self._path[step]) - _wide(latents))
        # Not the path's point: an edit adds and rounds, and an edit that changes nothing must end where the base does.
        return self._callback(pipe, step, timestep, {**tensors, "latents": add(latents, self.steps[-1])})


def add(latents: torch.Tensor, correction: torch.Tensor) -> torch.Tensor:
    """``latents + correction``, added in the correction's type and rounded to that of the latents."""
    return (latents.to(correction.dtype) + correction.to(latents.device)).to(latents.dtype)


def _wide(latents: torch.Tensor) -> torch.Tensor:
    # In double precision the difference of two float32 numbers and its sum with one of them give the other back.
    return latents.detach().to(torch.float32 if latents.device.type == "mps" else torch.float64)
