"""One edit of one base, run: dense calls until its mask is known, sparse ones after that.

The edits of several prompts at once are ``pipelines.batch``'s.
"""

from __future__ import annotations

import torch

from fisedit_compiler.module import SparseModule
from fisedit_compiler.pipelines.detectors import DetectionContext, MaskDetector
from fisedit_compiler.pipelines.editing.driver import Driver
from fisedit_compiler.pipelines.editing.plan import EditPlan
from fisedit_compiler.pipelines.editing.runs import Edit
from fisedit_compiler.pipelines.editing.steps import EmptyMaskFound, FollowBase
from fisedit_compiler.pipelines.editing.words import edit_columns
from fisedit_compiler.pipelines.instruments import timed_calls
from fisedit_compiler.runtime.sessions.edit_session import EditSession


def run_edit(driver: Driver, compiled: SparseModule, plan: EditPlan) -> Edit:
    """Make one edit.

    Args:
        driver: of the pipeline whose UNet is ``compiled``.
        compiled: the compiled UNet.
        plan: the edit, with checked arguments; not one that :meth:`EditPlan.without_a_run` answers.
    """
    base = plan.base
    assert base.recording is not None  # refused before
    if isinstance(plan.mask, MaskDetector):
        plan.mask.start(DetectionContext(driver.pipe, base, plan.prompt))
    mask = plan.mask if isinstance(plan.mask, torch.Tensor) else None
    growth = compiled.sparsify_config.dilation
    try:
        with compiled.edit(base.recording, mask=mask, record=plan.record) as session:
            _reuse_maps(driver, plan, session)
            follow = FollowBase(
                base.latents,
                session,
                plan.mask,
                plan.dense_calls,
                growth,
                region=plan.region,
                feather=plan.feather,
                strict=plan.is_strict,
            )
            with timed_calls(compiled) as seconds:
                image = driver.run(plan.prompt, plan.negative_prompt, base.settings, follow, "edit")
            follow.finish()
    except EmptyMaskFound as found:
        return plan.unchanged(found.note, calls=found.calls, detection=found.detection)
    return plan.edited(image, follow, session, seconds)


def _reuse_maps(driver: Driver, plan: EditPlan, session: EditSession) -> None:
    """While the mask is looked for, words that both prompts have attend as in the base, where it was recorded."""
    recording = plan.base.recording
    if isinstance(plan.mask, MaskDetector) and recording is not None and recording.num_maps:
        batch = recording.calls[0].batch
        session.reuse_maps(edit_columns(driver.pipe, plan.base.prompt, plan.prompt, batch))
