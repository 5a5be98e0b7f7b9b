"""A short run ahead of the first: on a GPU it makes the code that the first edit would wait for; disks keep it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from fisedit_compiler.module import SparseModule
from fisedit_compiler.runtime.execution.dense_graphs import RUNS

logger = logging.getLogger(__name__)

STEPS = 2
"""Of the run and of its edit; what a second call makes, such as the graphs of hoisted values, is made too."""
BOX = (0.375, 0.375, 0.625, 0.625)
"""What is edited; one compilation serves every mask."""


class Door(Protocol):
    """What is asked of an Editor."""

    pipe: Any

    @property
    def compiled(self) -> SparseModule: ...

    @property
    def generate(self) -> Callable[..., Any]: ...

    @property
    def edit(self) -> Callable[..., Any]: ...


def warm_up(
    editor: Door,
    *,
    height: int | None,
    width: int | None,
    guidance_scale: float,
    options: Mapping[str, Any] | None,
) -> None:
    """Generate pictures and edit them, where sparse calls are lowered; elsewhere there is nothing to make ahead.

    A pipeline that wants more than it is given, such as the picture of a ControlNet, makes its code at the first use
    as ever; a warning says so.

    Args:
        editor: whose pipeline runs.
        height: of the pictures to come, in pixels; the model's own size if left out.
        width: likewise.
        guidance_scale: 1 or less halves the batch.
        options: as in :meth:`~fisedit_compiler.pipelines.Editor.generate`.

    Raises:
        FiseditError: the run cannot be recorded or edited, or no code be made for it with ``backend="inductor"``.
    """
    compiled = editor.compiled
    device = next((parameter.device for parameter in compiled.original.parameters()), torch.device("cpu"))
    if compiled.sparsify_config.backend_on(device.type) == "eager":
        return
    for _ in range(RUNS):  # dense calls are compiled for a size that comes again
        try:
            base = editor.generate(
                "", seed=0, num_inference_steps=STEPS, guidance_scale=guidance_scale, height=height, width=width,
                options=options,
            )  # fmt: skip
        except (TypeError, ValueError, AttributeError) as error:
            name = type(editor.pipe).__name__
            logger.warning(
                "%s cannot run ahead of the first use (%s: %s), so that its first edit waits for a compilation; give "
                "prepare() what generate() needs, such as options={'image': ...}",
                name,
                type(error).__name__,
                error,
            )
            return
        editor.edit(base, "a picture", box=BOX)
