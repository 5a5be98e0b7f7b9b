"""What a mask detector is: it watches the first steps of an edit and says which sites the prompt changes.

The rules themselves are in the other files of this folder, one each; who runs the steps is ``pipelines.editing.batch``.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fisedit_compiler.errors import MaskError

if TYPE_CHECKING:
    from fisedit_compiler.pipelines.editing.runs import Generation


SHORT_RUN = 8
"""A run of up to so many steps is one of a model that was made for few: each step does much, and a dense one costs a
good part of the run. Its first step says enough (``docs/masks.md``)."""
LOOKS = 4
"""Steps to look at, at most, in longer runs."""


@dataclass(frozen=True)
class DetectedMask:
    """What a detector found.

    Attributes:
        mask: bool ``[H, W]`` on the CPU at the latent's size, true where the edit may change the latents; empty if the
            prompts do not differ in the picture, full with ``everywhere``.
        threshold: the value of ``heat`` above which a site counts as changed; ``None`` if there was nothing to split.
        heat: float32 ``[H, W]`` on the CPU: how much each site changes, on the detector's own scale.
        everywhere: whether the prompt changes the whole picture, so that no part of the base is worth keeping. The
            rest of the run is then dense.
        quiet: mean heat below the threshold over that above it: near 0 for a local change, ``None`` if unknown. It is
            the figure that was decided by, so it may be a mean of several steps.
    """

    mask: torch.Tensor
    threshold: float | None
    heat: torch.Tensor
    everywhere: bool = False
    quiet: float | None = None


@dataclass(frozen=True)
class DetectionContext:
    """What a detector may look at besides the latents.

    Attributes:
        pipe: the diffusers pipeline that runs the edit.
        base: the run that is edited, with its picture, prompt, latents and recording.
        prompt: the new prompt.
    """

    pipe: Any
    base: Generation
    prompt: str


class MaskDetector(ABC):
    """Finds the region that an edit changes while the edit's first steps run densely.

    Subclass it, register the class with :func:`~fisedit_compiler.pipelines.detectors.register_mask_detector`, and
    ``editor.edit(base, prompt, mask="your name")`` uses it; an instance can be passed as well. For every edit the
    Editor takes a :meth:`fresh` copy, calls :meth:`start` once, then after every step :meth:`update` and
    :meth:`decide`.

    Attributes:
        name: what reports call it; the registered name.
        max_calls: steps it may look at before it has to decide; ``None`` for one in a run of up to :data:`SHORT_RUN`
            steps and :data:`LOOKS` in others.
    """

    name: str = "custom"
    max_calls: int | None = None

    def looks(self, steps: int) -> int:
        """Steps it may look at in a run of ``steps``; if there are two or more, one is left to use the mask in."""
        usual = 1 if steps <= SHORT_RUN else LOOKS
        return max(1, min(usual if self.max_calls is None else self.max_calls, steps - 1))

    def fresh(self) -> MaskDetector:
        """The same detector with nothing seen yet."""
        return copy.deepcopy(self)

    def start(self, context: DetectionContext) -> None:
        """Told once before the first step. A rule of the latents alone needs nothing of it."""
        del context

    @abstractmethod
    def update(self, edited: torch.Tensor, base: torch.Tensor) -> None:
        """See one more step: latents ``[B, C, H, W]`` of the edit and of the base after it."""

    @abstractmethod
    def decide(self, last: bool) -> DetectedMask | None:
        """The mask of the steps seen so far, or ``None`` to look at another one; with ``last`` there is none left."""


def latent_difference(edited: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """``|edited - base|`` summed over batch and channels, float32 ``[H, W]`` on the CPU.

    Raises:
        MaskError: the two shapes differ, or the latents hold NaN or infinity.
    """
    return difference_and_size(edited, base)[0]


def difference_and_size(edited: torch.Tensor, base: torch.Tensor) -> tuple[torch.Tensor, float]:
    """:func:`latent_difference`, and the base's largest absolute latent; both are read from the device at once.

    Raises:
        MaskError: as there.
    """
    if edited.shape != base.shape:
        raise MaskError(
            f"latents of shape {list(edited.shape)} cannot be compared with the base's "
            f"{list(base.shape)}; edit at the base's height and width"
        )
    compared = base.float()
    difference = (edited.float() - compared).abs().sum(dim=(0, 1))
    *_, height, width = base.shape
    found = torch.cat([difference.flatten(), compared.abs().amax().reshape(1)]).cpu()
    difference, size = found[:-1].view(height, width), float(found[-1])
    if not bool(difference.isfinite().all()):
        raise MaskError(
            "the latents hold NaN or infinity, so no mask can be found; run in float32 or bfloat16, or "
            "check the scheduler's settings"
        )
    return difference, size
