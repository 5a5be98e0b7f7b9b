"""Several edits of one base in one run: a batch of prompts, one noise, one sparse program.

The UNet gets every prompt's latents in one call. What each prompt may change, and what became of it, is kept apart
here; that a batch reads a recording of one image is the business of ``runtime.copies``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fisedit_compiler.errors import MaskError, PromptError
from fisedit_compiler.masks import MaskLike
from fisedit_compiler.module import SparseModule
from fisedit_compiler.pipelines.detectors import DetectedMask, DetectionContext, MaskDetector, is_detector_name
from fisedit_compiler.pipelines.editing.driver import Driver
from fisedit_compiler.pipelines.editing.plan import EditPlan
from fisedit_compiler.pipelines.editing.report import Detection
from fisedit_compiler.pipelines.editing.runs import Edit
from fisedit_compiler.pipelines.editing.steps import EmptyMaskFound, FollowBase
from fisedit_compiler.pipelines.instruments import timed_calls
from fisedit_compiler.recordings.recording import Recording
from fisedit_compiler.runtime.calls.call import CallKind
from fisedit_compiler.runtime.sessions.edit_session import EditSession

Mask = MaskLike | MaskDetector | None
EVERYWHERE = "a prompt of this batch changes the whole picture: calls run densely"


def check_prompts(prompts: object) -> list[str]:
    """The prompts of a batch as a list.

    Raises:
        PromptError: there is none, or it is one string.
    """
    if isinstance(prompts, str):
        raise PromptError("edit_many() takes a list of prompts, got one string; use edit() for one prompt")
    if not isinstance(prompts, Sequence):
        raise PromptError(f"edit_many() takes a list of prompts, got a {type(prompts).__name__}")
    if not prompts:
        raise PromptError("edit_many() got no prompts; pass at least one")
    return list(prompts)


def masks_of_prompts(mask: Mask | Sequence[Mask], count: int) -> list[Any]:
    """The mask argument of each prompt.

    Args:
        mask: one for all, a list or tuple with one each, or a stack ``[count, H, W]`` (or ``[count, 1, H, W]``).
        count: number of prompts.

    Raises:
        MaskError: neither one mask nor ``count`` of them, or masks beside prompts whose mask is to be found.
    """
    stacked = isinstance(mask, (torch.Tensor, np.ndarray)) and (
        (mask.ndim == 3 and mask.shape[0] != 1) or (mask.ndim == 4 and mask.shape[0] != 1 and mask.shape[1] == 1)
    )
    if not stacked and not isinstance(mask, (list, tuple)):
        return [mask] * count
    each: list[Any] = list(mask)  # type: ignore[arg-type]
    if len(each) != count:
        raise MaskError(
            f"{len(each)} masks were given for {count} prompt{'s' * (count != 1)}; pass one mask for all of them, one "
            "for each, or none to find them"
        )
    if len({_is_automatic(one) for one in each}) > 1:
        raise MaskError(
            "some prompts have a mask and others none: those to be found need dense calls for the whole batch; give "
            "masks to all prompts or to none, or make two batches"
        )
    return each


def _is_automatic(mask: Any) -> bool:
    return mask is None or isinstance(mask, MaskDetector) or is_detector_name(mask)


@dataclass(frozen=True)
class CopyFollowed:
    """What became of one prompt's latents and mask."""

    latents: Sequence[torch.Tensor]
    detected: DetectedMask | None
    detection: Detection | None
    mask: torch.Tensor
    restored_steps: int


@dataclass(frozen=True)
class CopyRan:
    """How the calls of a batch ran, and the recording of one prompt."""

    timings: Sequence[tuple[CallKind, float]]
    computed_samples: Sequence[int]
    fallback: str | None
    result: Recording | None


class CopySession:
    """What one prompt's :class:`~fisedit_compiler.pipelines.editing.steps.FollowBase` takes for its session.

    Attributes:
        found: the mask that was found for this prompt.
    """

    def __init__(self, session: EditSession) -> None:
        self._session = session
        self.found: torch.Tensor | None = None

    @property
    def timings(self) -> Sequence[tuple[CallKind, float]]:
        return self._session.timings

    def set_mask(self, mask: torch.Tensor) -> None:
        self.found = mask


class FollowBatch:
    """Keeps every edit of a batch on the base outside its own mask, and finds the masks first if none were given.

    Each prompt is followed by itself; latents are ``[P, C, H, W]`` here and the base's ``[1, C, H, W]``. The calls of
    the batch are dense until the last prompt has its mask.
    """

    def __init__(self, plans: Sequence[EditPlan], session: EditSession, growth: int) -> None:
        self._session = session
        self._copies = [CopySession(session) for _ in plans]
        self._follow = [
            FollowBase(
                plan.base.latents,
                copy,
                plan.mask,
                plan.dense_calls,
                growth,
                region=plan.region,
                strict=plan.is_strict,
            )
            for plan, copy in zip(plans, self._copies, strict=True)
        ]
        self._nothing: dict[int, EmptyMaskFound] = {}
        self._searching = any(isinstance(plan.mask, MaskDetector) for plan in plans)

    def __call__(
        self, pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        latents = tensors["latents"]
        each = [latents[copy : copy + 1] for copy in range(len(self._follow))]
        for copy, follow in enumerate(self._follow):
            if copy in self._nothing:
                continue
            try:
                each[copy] = follow(pipe, step, timestep, {"latents": each[copy]})["latents"]
            except EmptyMaskFound as found:
                self._nothing[copy] = found
        for copy in self._nothing:
            each[copy] = self._follow[copy].base_latents[step]
        if self._searching and all(follow.detected is not None for follow in self._follow):
            self._set_masks()
            self._searching = False
        return {"latents": torch.cat(each)}

    def finish(self) -> None:
        """Judge what was not waited for while the run went on; see :meth:`FollowBase.finish`."""
        for follow in self._follow:
            follow.finish()

    def of_copy(self, copy: int) -> CopyFollowed | EmptyMaskFound:
        """What became of one prompt, in tensors of its own; or that there was nothing to change for it."""
        if copy in self._nothing:
            return self._nothing[copy]
        follow = self._follow[copy]
        assert follow.mask is not None  # the run has ended, so masks were given or found
        return CopyFollowed(follow.latents, follow.detected, follow.detection, follow.mask, follow.restored_steps)

    def _set_masks(self) -> None:
        found = [follow.detected for follow in self._follow if follow.detected is not None]
        everywhere = [mask.everywhere for mask in found]
        if all(everywhere):
            return  # nothing to keep: without a mask the session runs the other calls densely, too
        if len(self._nothing) == len(found):
            raise next(iter(self._nothing.values()))
        masks = [mask.mask for mask in found]
        self._session.set_mask(masks, densely=EVERYWHERE if any(everywhere) else None)


def run_batch(driver: Driver, compiled: SparseModule, plans: Sequence[EditPlan]) -> list[Edit]:
    """Make the edits in one run of the pipeline; those that change nothing are answered without.

    Args:
        driver: of the pipeline whose UNet is ``compiled``.
        compiled: the compiled UNet.
        plans: one per prompt, all of one base, with checked arguments.
    """
    edits = [plan.without_a_run() for plan in plans]
    left = [number for number, edit in enumerate(edits) if edit is None]
    if left:
        together = [replace(plans[number], together=len(left)) for number in left]
        for number, edit in zip(left, _run(driver, compiled, together), strict=True):
            edits[number] = edit
    return [edit for edit in edits if edit is not None]


def _run(driver: Driver, compiled: SparseModule, plans: Sequence[EditPlan]) -> list[Edit]:
    first, count = plans[0], len(plans)
    for plan in plans:
        if isinstance(plan.mask, MaskDetector):
            plan.mask.start(DetectionContext(driver.pipe, plan.base, plan.prompt))
    given: Any = [plan.mask.cpu() for plan in plans if isinstance(plan.mask, torch.Tensor)]
    assert first.base.recording is not None  # refused before
    seconds: list[float] = []
    try:
        # One copy takes a mask, not a list of masks: a list of one is a list all the same.
        with compiled.edit(first.base.recording, given or None, record=first.record, copies=count) as session:
            follow = FollowBatch(plans, session, compiled.sparsify_config.dilation)
            with timed_calls(compiled) as seconds:
                images = driver.run_copies(
                    [plan.prompt for plan in plans],
                    first.negative_prompt,
                    first.base.settings,
                    follow,
                    f"edit of {count} prompts",
                )
            follow.finish()
    except EmptyMaskFound as found:
        return [_nothing_found(plan, found, count) for plan in plans]
    shares = [took / count for took in seconds]
    edits = []
    for number, plan in enumerate(plans):
        followed = follow.of_copy(number)
        if isinstance(followed, EmptyMaskFound):
            edits.append(_nothing_found(plan, followed, count))
            continue
        result = session.results[number] if session.results else None
        ran = CopyRan(session.timings, session.computed_samples, session.fallback, result)
        edits.append(plan.edited(images[number], followed, ran, shares))
    return edits


def _nothing_found(plan: EditPlan, found: EmptyMaskFound, count: int) -> Edit:
    calls = tuple((kind, took / count) for kind, took in found.calls)
    return plan.unchanged(found.note, calls=calls, detection=found.detection)
