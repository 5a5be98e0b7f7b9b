"""The Editor's runs on all sites: a base, which is recorded, and a run to compare an edit with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image

from fisedit_compiler.module import SparseModule
from fisedit_compiler.pipelines.editing.driver import Driver
from fisedit_compiler.pipelines.editing.one_run import only_run_of
from fisedit_compiler.pipelines.editing.runs import DenseRun, Generation, RunSettings
from fisedit_compiler.pipelines.editing.steps import KeepLatents
from fisedit_compiler.pipelines.instruments import timed_calls
from fisedit_compiler.pipelines.parts import Parts


def generate_base(
    driver: Driver,
    ready: Callable[[], Parts],
    prompt: str,
    negative_prompt: str | None,
    settings: RunSettings,
    maps: int,
) -> Generation:
    """Make a picture with all parts recording; ``ready`` compiles them, ``maps`` is that of ``Parts.record``.

    Raises:
        FiseditError: see :meth:`fisedit_compiler.pipelines.Editor.generate`.
    """
    keep = KeepLatents()

    def run() -> tuple[Image.Image, torch.Tensor]:
        with driver.kept_start() as start:
            return driver.run(prompt, negative_prompt, settings, keep, "generate"), start[0]

    with only_run_of(driver.pipe):
        (image, start), recordings = ready().record(maps, run)
    return Generation(
        prompt=prompt,
        negative_prompt=negative_prompt,
        settings=settings,
        image=image,
        latents=tuple(keep.latents),
        initial_latents=start,
        recordings=recordings,
    )


def run_dense(
    driver: Driver, compiled: Callable[[], SparseModule], base: Generation, prompt: str, negative_prompt: str | None
) -> DenseRun:
    """Run a prompt with a base's noise and settings in no mode; ``compiled`` gives the UNet, whose calls are timed.

    Raises:
        FiseditError: see :meth:`fisedit_compiler.pipelines.Editor.dense`.
    """
    keep = KeepLatents()
    with only_run_of(driver.pipe), timed_calls(compiled()) as seconds:
        image = driver.run(prompt, negative_prompt, base.settings, keep, "dense")
    return DenseRun(image, keep.latents[-1], tuple(seconds))
