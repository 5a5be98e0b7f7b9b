"""One edit before it runs and after: its checked arguments, where its mask comes from, and the result they make.

Nothing is run here; ``editing.batch`` does that in between.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from PIL import Image

from fisedit_compiler import masks
from fisedit_compiler.config import Reuse
from fisedit_compiler.errors import ConfigError, FiseditError, MaskError
from fisedit_compiler.masks import MaskLike
from fisedit_compiler.pipelines.decoding.runs import Decode
from fisedit_compiler.pipelines.detectors import MaskDetector, is_detector_name, make_mask_detector, mask_detectors
from fisedit_compiler.pipelines.drawing.pictures import mask_to_pixels
from fisedit_compiler.pipelines.drawing.seam import pasted
from fisedit_compiler.pipelines.editing.region import cut
from fisedit_compiler.pipelines.editing.report import Decoding, Detection, EditReport
from fisedit_compiler.pipelines.editing.runs import Edit, Generation
from fisedit_compiler.pipelines.editing.steps import FollowBase
from fisedit_compiler.pipelines.parts import PartRecording
from fisedit_compiler.runtime.sessions.edit_session import EditSession


@dataclass(frozen=True)
class EditRequest:
    """The checked arguments of one edit, and the two ways it can end.

    ``number`` counts the edits that were ``asked_for`` at once, from 0. ``together`` of them are made in one run: each
    has an equal share of its time.
    """

    base: Generation
    prompt: str
    negative_prompt: str | None
    source: str
    mask: torch.Tensor | MaskDetector
    dense_calls: int
    record: bool
    reuse: Reuse | None
    started: float
    region: torch.Tensor | None = None
    feather: int = 0
    number: int = 0
    asked_for: int = 1
    together: int = 1

    def naming(self) -> AbstractContextManager[None]:
        """Says in errors raised inside which edit they are about, if several were asked for."""
        return naming_edit(self.number, self.asked_for)

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
            recordings=base.recordings,
            base=base,
            mask=empty,
            report=report,
            pixels=torch.zeros(base.image.height, base.image.width, dtype=torch.bool, device="cpu"),
        )

    def edited(
        self,
        image: Image.Image,
        follow: FollowBase,
        session: EditSession,
        recordings: Mapping[str, PartRecording],
        seconds: Sequence[float],
        decode: Decode | None = None,
    ) -> Edit:
        """The edit whose run has ended.

        Args:
            image: the picture.
            follow: what became of its latents and its mask.
            session: how the calls of the UNet ran.
            recordings: the edit's own, by part; none if it was not recorded.
            seconds: what each call took of this edit's time.
            decode: how the picture was decoded; ``None`` if the pipeline's VAE did it alone.
        """
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
            own_bytes=sum(recording.own_nbytes for recording in recordings.values()),
            restored_steps=follow.restored_steps,
            regions=masks.regions(mask),
            feather=0 if everywhere else self.feather,
            note=_note(follow, session),
            decode=None if decode is None else Decoding(decode.kind, decode.area, decode.seconds, decode.note),
        )
        pixels = None if decode is None else decode.pixels
        if self.base.settings.corrections is not None:
            pixels = torch.from_numpy(mask_to_pixels(mask, self.base.image))
            image = pasted(image, self.base.image, mask)
        return Edit(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            settings=self.base.settings,
            image=image,
            latents=tuple(follow.latents),
            initial_latents=self.base.initial_latents,
            recordings=recordings,
            base=self.base,
            mask=mask,
            report=report,
            heat=None if found is None else found.heat,
            pixels=pixels,
        )


@contextmanager
def naming_edit(number: int, count: int) -> Iterator[None]:
    """Says in errors raised inside which of ``count`` edits they are about; ``number`` counts from 0."""
    try:
        yield
    except FiseditError as error:
        if count > 1:
            error.args = (f"edit {number + 1} of {count}: {error}", *error.args[1:])
        raise


@dataclass(frozen=True)
class MaskSource:
    """Where a mask comes from: ``"user"`` and bool ``[H, W]`` on the CPU, or a detector and its name."""

    name: str
    mask: torch.Tensor | MaskDetector


def mask_source(mask: MaskLike | MaskDetector | None, base: Generation) -> MaskSource | None:
    """What ``mask=`` asks for; ``None`` if it was left out.

    Raises:
        MaskError: it is no mask, no detector and no name of one.
    """
    if mask is None:
        return None
    if isinstance(mask, str) and is_detector_name(mask):
        mask = make_mask_detector(mask)
    if isinstance(mask, MaskDetector):
        return MaskSource(mask.name, mask)
    height, width = base.latents[0].shape[-2:]
    try:
        sites = masks.to_site_mask(mask, height, width, image_scale=base.settings.height // height)
    except MaskError as error:
        if isinstance(mask, str) and "." not in mask:
            raise MaskError(f"{error}; mask detectors are {', '.join(mask_detectors())}") from error
        raise
    return MaskSource("user", sites.cpu())


def within(source: MaskSource | None, region: torch.Tensor | None) -> tuple[MaskSource, torch.Tensor | None]:
    """The mask inside a region, and the region.

    A region is the mask if none was asked for, and cuts one that was drawn; one that is found is cut when it is.

    Raises:
        MaskError: nothing of a drawn mask lies in the region.
    """
    if source is None:
        detector = make_mask_detector()
        return (MaskSource(detector.name, detector) if region is None else MaskSource("user", region)), region
    if isinstance(source.mask, torch.Tensor):
        source = MaskSource(source.name, cut(source.mask, region))
    return source, region


def detection_steps(mask: torch.Tensor | MaskDetector, dense_calls: int | None, steps: int) -> int:
    """Steps at most in which the mask is found: ``dense_calls``, or what the detector wants; 0 for a given mask.

    Args:
        mask: that is given, or what finds one.
        dense_calls: as asked for.
        steps: after which the base has latents.

    Raises:
        ConfigError: ``dense_calls`` leaves no step to find the mask in, or none to use it in. The mask of a run of one
            step is found in that.
    """
    if isinstance(mask, torch.Tensor):
        return 0
    if dense_calls is None:
        return mask.looks(steps)
    if not 1 <= dense_calls < max(steps, 2):
        most = f"less than the {steps} steps of the base" if steps > 1 else "no more: the base has one step"
        raise ConfigError(f"dense_calls={dense_calls} must be at least 1 and {most}")
    return dense_calls


def _note(follow: FollowBase, session: EditSession) -> str:
    """Why calls ran densely, if there is more to say than that a mask was looked for."""
    if follow.detected is not None and follow.detected.everywhere:
        return "the prompt changes the whole picture: run densely"
    if follow.detection is not None and follow.detection.steps == len(follow.base_latents):
        return "the mask was found in the last step, so no call was sparse: draw it, or make more steps"
    return session.fallback or ""


def _nbytes(base: Generation) -> int:
    return sum(recording.nbytes for recording in base.recordings.values())
