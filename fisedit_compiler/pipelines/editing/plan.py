"""One edit before it runs and after: its checked arguments, where its mask comes from, and the result they make.

Nothing is run here; ``pipelines.single`` and ``pipelines.batch`` do that in between.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image

from fisedit_compiler import masks
from fisedit_compiler.errors import ConfigError, MaskError
from fisedit_compiler.masks import MaskLike
from fisedit_compiler.pipelines.detectors import (
    DetectedMask,
    MaskDetector,
    is_detector_name,
    make_mask_detector,
    mask_detectors,
)
from fisedit_compiler.pipelines.drawing.seam import pasted
from fisedit_compiler.pipelines.editing.region import cut
from fisedit_compiler.pipelines.editing.report import Detection, EditReport
from fisedit_compiler.pipelines.editing.runs import Edit, Generation
from fisedit_compiler.recordings.recording import Recording
from fisedit_compiler.runtime.calls.call import CallKind


class Followed(Protocol):
    """What became of an edit's latents and mask; :class:`~.steps.FollowBase` knows it."""

    @property
    def latents(self) -> Sequence[torch.Tensor]: ...
    @property
    def detected(self) -> DetectedMask | None: ...
    @property
    def detection(self) -> Detection | None: ...
    @property
    def mask(self) -> torch.Tensor | None: ...
    @property
    def restored_steps(self) -> int: ...


class Ran(Protocol):
    """How an edit's calls ran; an :class:`~fisedit_compiler.runtime.sessions.edit_session.EditSession` knows it."""

    @property
    def timings(self) -> Sequence[tuple[CallKind, float]]: ...
    @property
    def computed_samples(self) -> Sequence[int]: ...
    @property
    def fallback(self) -> str | None: ...
    @property
    def result(self) -> Recording | None: ...


@dataclass(frozen=True)
class EditPlan:
    """The checked arguments of one edit, and the two ways it can end.

    ``together`` edits are made in one run: each has an equal share of its time.
    """

    base: Generation
    prompt: str
    negative_prompt: str | None
    source: str
    mask: torch.Tensor | MaskDetector
    dense_calls: int
    record: bool
    started: float
    region: torch.Tensor | None = None
    feather: int = 0
    together: int = 1

    @property
    def is_strict(self) -> bool:
        """Whether nothing outside the mask may leave the base after any step: the mask is known from the start."""
        return isinstance(self.mask, torch.Tensor) and self.base.is_followed_exactly

    def without_a_run(self) -> Edit | None:
        """The answer to an edit that its arguments say changes nothing; ``None`` if it must be run."""
        base = self.base
        if self.prompt == base.prompt and (self.negative_prompt or "") == (base.negative_prompt or ""):
            return self.unchanged("the prompts are the base's: nothing was run", source="none")
        if isinstance(self.mask, torch.Tensor) and not bool(self.mask.any()):
            return self.unchanged("the mask is empty: nothing was run")
        return None

    def unchanged(
        self,
        note: str,
        source: str | None = None,
        calls: tuple[tuple[str, float], ...] = (),
        detection: Detection | None = None,
    ) -> Edit:
        """The base as an edit: same picture, latents and recording."""
        empty = torch.zeros(self.base.latents[0].shape[-2:], dtype=torch.bool, device="cpu")
        report = EditReport(
            mask_source=source or self.source,
            area=0.0,
            detection=detection,
            calls=calls,
            wall_seconds=(time.perf_counter() - self.started) / self.together,
            recording_bytes=_nbytes(self.base),
            note=note,
        )
        base = self.base
        return Edit(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            settings=base.settings,
            image=base.image,
            latents=base.latents,
            initial_latents=base.initial_latents,
            recording=base.recording,
            base=base,
            mask=empty,
            report=report,
        )

    def edited(self, image: Image.Image, follow: Followed, session: Ran, seconds: Sequence[float]) -> Edit:
        """The edit whose run has ended."""
        found = follow.detected
        mask = follow.mask
        assert mask is not None  # the run has ended, so a mask was given or found
        everywhere = found is not None and found.everywhere
        # The session's own times leave out what a GPU is still doing when a call returns.
        kinds = [kind for kind, _ in session.timings]
        whole = max(session.computed_samples, default=0)
        dense = [n for kind, n in zip(kinds, session.computed_samples, strict=True) if kind == "dense"]
        report = EditReport(
            mask_source=self.source,
            area=masks.area(mask),
            detection=follow.detection,
            partial_calls=sum(1 for samples in dense if samples < whole),
            calls=tuple(zip(kinds, seconds, strict=True)),
            wall_seconds=(time.perf_counter() - self.started) / self.together,
            recording_bytes=_nbytes(self.base),
            own_bytes=session.result.own_nbytes if self.record and session.result is not None else 0,
            restored_steps=follow.restored_steps,
            regions=masks.regions(mask),
            feather=0 if everywhere else self.feather,
            note="the prompt changes the whole picture: run densely" if everywhere else session.fallback or "",
        )
        return Edit(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            settings=self.base.settings,
            image=image if self.base.settings.corrections is None else pasted(image, self.base.image, mask),
            latents=tuple(follow.latents),
            initial_latents=self.base.initial_latents,
            recording=session.result if self.record else None,
            base=self.base,
            mask=mask,
            report=report,
            heat=None if found is None else found.heat,
        )


def mask_argument(
    mask: MaskLike | MaskDetector | None, base: Generation, region: torch.Tensor | None = None
) -> tuple[str, torch.Tensor | MaskDetector]:
    """Where the mask comes from, and the mask itself or the detector that will find it.

    A region is the mask if there is no other, and cuts one that was drawn; one that is found is cut when it is.

    Raises:
        MaskError: it is no mask, no detector and no name of one, or nothing of it lies in the region.
    """
    if mask is None and region is not None:
        return "user", region
    if mask is None:
        mask = make_mask_detector()
    if isinstance(mask, str) and is_detector_name(mask):
        mask = make_mask_detector(mask)
    if isinstance(mask, MaskDetector):
        return mask.name, mask.fresh()
    height, width = base.latents[0].shape[-2:]
    try:
        sites = masks.to_site_mask(mask, height, width, image_scale=base.settings.height // height)
    except MaskError as error:
        if isinstance(mask, str) and "." not in mask:
            raise MaskError(f"{error}; mask detectors are {', '.join(mask_detectors())}") from error
        raise
    return "user", cut(sites, region)


def detection_steps(mask: torch.Tensor | MaskDetector, dense_calls: int | None, steps: int) -> int:
    """Steps at most in which the mask is found: ``dense_calls``, or what the detector wants; 0 for a given mask.

    Raises:
        ConfigError: ``dense_calls`` leaves no step to find the mask in, or none to use it in.
    """
    if isinstance(mask, torch.Tensor):
        return 0
    if dense_calls is None:
        return max(1, min(mask.max_calls, steps - 1))
    if not 1 <= dense_calls < steps:
        raise ConfigError(f"dense_calls={dense_calls} must be at least 1 and less than the {steps} steps of the base")
    return dense_calls


def _nbytes(base: Generation) -> int:
    return base.recording.nbytes if base.recording is not None else 0
