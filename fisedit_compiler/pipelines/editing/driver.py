"""Runs a stock diffusers pipeline with the settings of a base, and only through its public features.

A seeded generator and ``callback_on_step_end`` with the latents are all it needs, and what ``prepare_latents`` returns
to know where a run started. What runs inside the pipeline's UNet, and what the callback does with the latents, is the
caller's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from fisedit_compiler.errors import RecordingError
from fisedit_compiler.pipelines.callbacks import StepCallback, Tensors
from fisedit_compiler.pipelines.editing import refusals
from fisedit_compiler.pipelines.editing.runs import RunSettings
from fisedit_compiler.pipelines.inversion.corrections import Corrections
from fisedit_compiler.pipelines.running.devices import device_looked_up
from fisedit_compiler.pipelines.running.pixels import gives_tensors, pictures
from fisedit_compiler.pipelines.running.run_scheduler import scheduler_of_a_run
from fisedit_compiler.pipelines.running.texts import Texts
from fisedit_compiler.progress import shown


@dataclass
class Driver:
    """Runs of one pipeline.

    Attributes:
        pipe: the pipeline; its UNet may be exchanged between runs.
        progress: switches its progress bars on or off; ``None`` leaves that to the pipeline's own setting.
        texts: what the text encoders made of the texts of earlier runs.
    """

    pipe: Any
    progress: bool | None = None
    texts: Texts = field(default_factory=Texts)

    def settings(
        self,
        *,
        seed: int,
        num_inference_steps: int,
        guidance_scale: float,
        height: int | None = None,
        width: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> RunSettings:
        """The settings of a new base with the pipeline's scheduler; sizes are the model's own if left out.

        Raises:
            ConfigError: a setting is no number of its kind, or a size that the pipeline does not make; one of
                ``options`` is no argument of the pipeline's call, or one that is given to it anyway; or something would
                mix all sites between two UNet calls.
        """
        refusals.check_numbers(seed, num_inference_steps, guidance_scale, height, width)
        refusals.check_size(self.pipe, height, width)
        refusals.check_options(self.pipe, options or {})
        refusals.check_guidance(self.pipe, options or {})
        refusals.check_scheduler(self.pipe)
        refusals.check_schedule(self.pipe.scheduler, options or {})
        default_height, default_width = self.default_size
        return RunSettings(
            seed=int(seed),
            num_inference_steps=int(num_inference_steps),
            guidance_scale=float(guidance_scale),
            height=height or default_height,
            width=width or default_width,
            scheduler=refusals.scheduler_fingerprint(self.pipe.scheduler),
            options=dict(options or {}),
        )

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels of the pictures the model was trained on."""
        size = self.pipe.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.pipe.vae_scale_factor, width * self.pipe.vae_scale_factor

    def run(
        self,
        prompt: str,
        negative_prompt: str | None,
        settings: RunSettings,
        callback: StepCallback,
        description: str,
        scheduler: Any = None,
    ) -> Image.Image:
        """One picture; ``description`` names the progress bar.

        Args:
            prompt: what to draw.
            negative_prompt: what to keep away from.
            settings: of the run.
            callback: sees the latents after every step.
            description: names the progress bar.
            scheduler: instead of a copy of the pipeline's; it is used as it is.

        Raises:
            RecordingError: the run was stopped before its last step.
            ConfigError: the scheduler draws numbers that no seed decides.
        """
        corrections = settings.corrections
        generator, start = _generator(settings), None if corrections is None else corrections.start
        with scheduler_of_a_run(self.pipe, settings.seed, own=scheduler):
            images = self._call(prompt, negative_prompt, settings, generator, start, callback, description)
        return images[0]

    def run_edits(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str | None],
        settings: RunSettings,
        callback: StepCallback,
    ) -> list[Image.Image]:
        """A picture for every prompt, all from the same noise, in one batch; latents are ``[P, C, H, W]``.

        One of them is :meth:`run`. Where some have no negative prompt and others have one, theirs is empty.

        Raises:
            RecordingError: as :meth:`run` does.
            ConfigError: likewise.
        """
        count, corrections = len(prompts), settings.corrections
        if count == 1:
            return [self.run(prompts[0], negative_prompts[0], settings, callback, "edit")]
        given = any(prompt is not None for prompt in negative_prompts)
        negative = [prompt or "" for prompt in negative_prompts] if given else None
        # Equally seeded generators, not one: every picture draws the same noise, at every step that draws.
        generators = [_generator(settings) for _ in prompts]
        start = None if corrections is None else corrections.start.repeat(count, 1, 1, 1)
        with scheduler_of_a_run(self.pipe, settings.seed, count):
            return self._call(
                list(prompts), negative, settings, generators, start, callback, f"edit of {count} prompts"
            )

    @contextmanager
    def kept_start(self) -> Iterator[list[torch.Tensor]]:
        """Keeps the latents ``[1, C, H, W]`` that each run inside the block starts from."""
        kept: list[torch.Tensor] = []
        prepare = self.pipe.prepare_latents

        def keeping(*args: Any, **kwargs: Any) -> Any:
            prepared = prepare(*args, **kwargs)
            # Inpainting pipelines return more than the latents.
            kept.append((prepared[0] if isinstance(prepared, tuple) else prepared).clone())
            return prepared

        self.pipe.prepare_latents = keeping
        try:
            yield kept
        finally:
            del self.pipe.prepare_latents

    @property
    def shows_progress(self) -> bool:
        """Whether runs show a bar."""
        if self.progress is not None:
            return self.progress
        return not getattr(self.pipe, "_progress_bar_config", {}).get("disable", False)

    def _call(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None,
        settings: RunSettings,
        generator: torch.Generator | list[torch.Generator],
        start: torch.Tensor | None,
        callback: StepCallback,
        description: str,
    ) -> list[Image.Image]:
        corrections: Corrections | None = settings.corrections
        tensors = gives_tensors(self.pipe, settings.options)
        counted = _Counted(callback if corrections is None else corrections.before(callback))
        given: dict[str, Any] = {"callback_on_step_end": counted, "callback_on_step_end_tensor_inputs": ["latents"]}
        if refusals.decodes_another(self.pipe):
            given["callback_on_step_end"] = _decoding_latents(counted)
        if refusals.takes_negative_prompts(self.pipe):
            given["negative_prompt"] = negative_prompt
        with (
            self._progress_bar(description),
            shown(self.shows_progress),
            self.texts.encoded_once(self.pipe),
            device_looked_up(self.pipe),
            refusals.naming_schedule(self.pipe.scheduler, settings.num_inference_steps),
        ):
            try:
                output = self.pipe(
                    prompt=prompt,
                    num_inference_steps=settings.num_inference_steps,
                    guidance_scale=settings.guidance_scale,
                    height=settings.height,
                    width=settings.width,
                    generator=generator,
                    latents=start,
                    output_type="pt" if tensors else "pil",
                    **given,
                    **settings.options,
                )
            except RecordingError:
                if getattr(self.pipe, "interrupt", False) is True:
                    counted.check(self.pipe, description)  # what a later part missed is that the run was stopped
                raise
        counted.check(self.pipe, description)
        return pictures(output.images) if tensors else list(output.images)

    @contextmanager
    def _progress_bar(self, description: str) -> Iterator[None]:
        """The pipeline's own bar, named or switched off for one run, the user's settings back afterwards."""
        saved = dict(getattr(self.pipe, "_progress_bar_config", {}))
        self.pipe.set_progress_bar_config(**{"desc": description, **saved, "disable": not self.shows_progress})
        try:
            yield
        finally:
            self.pipe.set_progress_bar_config(**saved)


def _decoding_latents(callback: StepCallback) -> StepCallback:
    """``callback``, in a pipeline that decodes the second result of the last step: it gets the latents for that, too.

    A scheduler's last step gives both alike (``refusals.check_scheduler``), and what the callback sets back or corrects
    holds for the picture.
    """

    def both(pipe: Any, step: int, timestep: Any, tensors: Tensors) -> Tensors:
        result = callback(pipe, step, timestep, tensors)
        return {**result, refusals.DENOISED: result["latents"]}

    return both


class _Counted:
    """Counts the steps of a run, so that one that was stopped is not taken for a whole one."""

    def __init__(self, callback: StepCallback) -> None:
        self.callback, self.steps = callback, 0

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: Tensors) -> Tensors:
        self.steps += 1
        return self.callback(pipe, step, timestep, tensors)

    def check(self, pipe: Any, description: str) -> None:
        """Look whether all steps were made.

        Raises:
            RecordingError: some are missing.
        """
        planned = getattr(pipe, "num_timesteps", None)
        if isinstance(planned, int):
            stopped, of = self.steps < planned, f" of {planned}"
        else:
            stopped, of = getattr(pipe, "interrupt", False) is True, ""
        if stopped:
            raise RecordingError(
                f"The run ({description}) was stopped after {self.steps}{of} steps "
                "(pipe._interrupt was set, or the pipeline left its loop early), so nothing of it is kept. What it "
                "started from is untouched: run it again, without stopping it."
            )


def _generator(settings: RunSettings) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(settings.seed)
