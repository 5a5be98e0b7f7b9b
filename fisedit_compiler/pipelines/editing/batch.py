"""The edits of one base in one run: dense calls until the last mask is known, sparse ones after that.

One edit is a batch of one. The UNet gets every prompt's latents in one call. What each prompt may change, and what
became of it, is its own :class:`~.steps.FollowBase`'s business; that a batch reads a recording of one image is
``runtime.sessions.copies``'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from fisedit_compiler.pipelines.callbacks import Tensors
from fisedit_compiler.pipelines.decoding.runs import DecodeEdit
from fisedit_compiler.pipelines.detectors import DetectionContext, MaskDetector
from fisedit_compiler.pipelines.editing.driver import Driver
from fisedit_compiler.pipelines.editing.request import EditRequest
from fisedit_compiler.pipelines.editing.runs import Edit
from fisedit_compiler.pipelines.editing.steps import FollowBase
from fisedit_compiler.pipelines.editing.words import edit_columns
from fisedit_compiler.pipelines.instruments import timed_calls
from fisedit_compiler.pipelines.parts import DECODER, UNET, Parts, PartSession, of_unet
from fisedit_compiler.runtime.calls.call import CallKind
from fisedit_compiler.runtime.sessions.edit_masks import EditMask, EditMasks
from fisedit_compiler.runtime.sessions.edit_session import EditSession

EVERYWHERE = "a prompt of this batch changes the whole picture: calls run densely"


class NothingToEdit(Exception):
    """No mask that was looked for has a site. Ends a run from inside; it is caught here, users never see it."""


class FollowEdits:
    """The step callback of a run of edits: each edit follows the base by itself, and when the last mask is known, the
    sessions are told all of them.

    Latents are ``[P, C, H, W]`` here and the base's ``[1, C, H, W]``.

    Attributes:
        each: what follows the base for each edit.
        ended: by the number of an edit that has nothing to change, the calls until that was known.
    """

    def __init__(
        self, requests: Sequence[EditRequest], each: Sequence[FollowBase], sessions: Mapping[str, PartSession]
    ) -> None:
        self.each = each
        self.ended: dict[int, tuple[tuple[CallKind, float], ...]] = {}
        self._requests, self._sessions = requests, sessions
        self._searching = any(follow.is_searching for follow in each)

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: Tensors) -> Tensors:
        kept = []
        together = tensors["latents"]
        for number, latents in enumerate(together.split(1) if len(self.each) > 1 else [together]):
            follow = self.each[number]
            with self._requests[number].naming():
                kept.append(follow(pipe, step, timestep, {"latents": latents})["latents"])
            if follow.nothing is not None and number not in self.ended:
                self.ended[number] = tuple(of_unet(self._sessions).timings)
        if self._searching and not any(follow.is_searching for follow in self.each):
            self._searching = False
            self._set_masks()
        return {"latents": torch.cat(kept) if len(kept) > 1 else kept[0]}

    def finish(self) -> None:
        """Judge what was not waited for while the run went on; see :meth:`FollowBase.finish`."""
        for request, follow in zip(self._requests, self.each, strict=True):
            with request.naming():
                follow.finish()

    def _set_masks(self) -> None:
        found = [follow.detected for follow in self.each if follow.detected is not None]
        everywhere = [one.everywhere for one in found]
        if all(everywhere):
            return  # nothing to keep: without a mask the sessions run the other calls densely, too
        if len(self.ended) == len(self.each):
            raise NothingToEdit
        # Where an edit changes everything or nothing, its mask is as it was found: there is nothing to grow.
        parts = [
            EditMask(one.mask, one.mask) if follow.kept is None else follow.kept
            for follow, one in zip(self.each, found, strict=True)
        ]
        for session in self._sessions.values():
            session.set_mask(EditMasks(parts), densely=EVERYWHERE if any(everywhere) else None)


@dataclass
class _Run:
    """What is known of a run while it goes on, and after it."""

    follow: FollowEdits
    sessions: Mapping[str, PartSession]
    images: Sequence[Image.Image] = ()
    seconds: Sequence[float] = ()


def run_edits(driver: Driver, parts: Callable[[], Parts], requests: Sequence[EditRequest]) -> list[Edit]:
    """Make edits of one base in one run of the pipeline; those that change nothing are answered without.

    Args:
        driver: of the pipeline.
        parts: asked for its compiled modules, in their places, if something must be run.
        requests: one per edit, all of one base, with checked arguments.
    """
    edits = [request.without_a_run() for request in requests]
    left = [number for number, edit in enumerate(edits) if edit is None]
    if left:
        together = [replace(requests[number], together=len(left)) for number in left]
        for number, edit in zip(left, _run(driver, parts(), together), strict=True):
            edits[number] = edit
    return [edit for edit in edits if edit is not None]


def _run(driver: Driver, parts: Parts, requests: Sequence[EditRequest]) -> list[Edit]:
    first, count = requests[0], len(requests)
    dilation = parts[UNET].sparsify_config.dilation
    for request in requests:
        if isinstance(request.mask, MaskDetector):
            with request.naming():
                request.mask.start(DetectionContext(driver.pipe, request.base, request.prompt))
    # A mask that several edits share is grown once.
    distinct = {id(one.mask): one.mask for one in requests if isinstance(one.mask, torch.Tensor)}
    given = {key: EditMask.of(mask, dilation) for key, mask in distinct.items()}
    runs: list[_Run] = []

    def run(sessions: Mapping[str, PartSession]) -> None:
        each = [_follow(request, given.get(id(request.mask)), dilation) for request in requests]
        running = _Run(FollowEdits(requests, each, sessions), sessions)
        runs.append(running)
        _reuse_maps(driver, requests, of_unet(sessions))
        prompts, negatives = [one.prompt for one in requests], [one.negative_prompt for one in requests]
        with timed_calls(parts[UNET]) as seconds:
            running.images = driver.run_edits(prompts, negatives, first.base.settings, running.follow)
        running.seconds = seconds
        running.follow.finish()

    masks = EditMasks([given[id(request.mask)] for request in requests]) if given else None
    with suppress(NothingToEdit):
        parts.edit(first.base.recordings, masks, run, record=first.record, copies=count, reuse=first.reuse)
    (ran,) = runs
    return [_made(request, number, ran, count) for number, request in enumerate(requests)]


def _follow(request: EditRequest, given: EditMask | None, dilation: int) -> FollowBase:
    mask = request.mask if isinstance(request.mask, MaskDetector) else given
    assert mask is not None  # a mask that is given was grown before
    return FollowBase(
        request.base.latents,
        mask,
        request.dense_calls,
        dilation=dilation,
        region=request.region,
        feather=request.feather,
        strict=request.is_strict,
    )


def _reuse_maps(driver: Driver, requests: Sequence[EditRequest], session: EditSession) -> None:
    """While masks are looked for, words that two prompts share attend as in the base, where it was recorded."""
    base = requests[0].base
    recording = base.recording
    if isinstance(requests[0].mask, MaskDetector) and recording is not None and recording.num_maps:
        batch = recording.calls[0].batch
        session.reuse_maps(edit_columns(driver.pipe, base.prompt, [one.prompt for one in requests], batch))


def _made(request: EditRequest, number: int, ran: _Run, count: int) -> Edit:
    """One of the edits of a run that is over."""
    follow = ran.follow.each[number]
    if follow.nothing is not None:
        calls = tuple((kind, took / count) for kind, took in ran.follow.ended[number])
        return request.unchanged(follow.nothing, calls=calls, detection=follow.detection)
    recordings = {name: session.results[number] for name, session in ran.sessions.items() if session.results}
    seconds = [took / count for took in ran.seconds]
    decoder = ran.sessions.get(DECODER)
    decode = decoder.decodes[number] if isinstance(decoder, DecodeEdit) and decoder.decodes else None
    return request.edited(ran.images[number], follow, of_unet(ran.sessions), recordings, seconds, decode)
