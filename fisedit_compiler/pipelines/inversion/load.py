"""Loading a picture that no run made: a path from it to noise, and a recorded run that is led along the path back.

``Editor.load`` is the door. Pictures are read in ``inversion.pictures``, paths are made in ``inversion.noise_paths``,
the run is led in ``inversion.corrections``, and pixels outside a mask are brought back in ``drawing.seam``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from PIL import Image

from fisedit_compiler.errors import ConfigError
from fisedit_compiler.pipelines.editing import refusals
from fisedit_compiler.pipelines.editing.driver import Driver
from fisedit_compiler.pipelines.editing.runs import Generation, RunSettings
from fisedit_compiler.pipelines.editing.steps import KeepLatents
from fisedit_compiler.pipelines.inversion import pictures
from fisedit_compiler.pipelines.inversion.corrections import Corrections, FollowPath
from fisedit_compiler.pipelines.inversion.noise_paths import (
    INVERTIBLE_PREDICTIONS,
    SCHEDULE_OPTIONS,
    InverseWalk,
    NoiseSchedule,
    edit_friendly_path,
    noise_schedule,
)
from fisedit_compiler.pipelines.likeness import psnr
from fisedit_compiler.pipelines.parts import Parts

Method = Literal["auto", "ddim", "edit-friendly"]
NATURAL_PSNR = 22.0
"""PSNR in dB from which on a free run counts as giving the picture back. Of eight pictures, those the model could have
drawn lay above 26, foreign ones at 16 (docs/inversion.md)."""


@dataclass(frozen=True)
class DdimInversion:
    """DDIM's walk backwards with settings of one's own, as ``Editor.load(inversion=...)``.

    Attributes:
        noisy_start: give the picture's latents noise of their own at the least noisy level and walk from there. An
            encoder's mean latents are smoother than anything the model was trained on; walked from directly, the noise
            at the end has too little variance and edits are worse (docs/inversion.md).
        rounds: UNet calls at every level; more than one looks for the fixed point.
        guidance_scale: of the walk. Above 1 it is known to drift (Mokady et al., "Null-text Inversion", CVPR 2023).

    Raises:
        ConfigError: fewer than one round.
    """

    noisy_start: bool = True
    rounds: int = 1
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ConfigError(f"rounds={self.rounds}: a walk calls the UNet at least once at every level")


@dataclass(frozen=True)
class Inversion:
    """How a picture was loaded and how well it comes back; ``print(inversion)`` shows it.

    Attributes:
        method: ``"ddim"`` or ``"edit-friendly"``.
        calls: UNet calls of DDIM's walk; the recorded run and those that measure are left out.
        seconds: duration of the whole loading.
        corrected_psnr: PSNR in dB of the decoded end of the recorded run and the picture. The run ends in the latents
            of the picture, so this is what the VAE alone loses.
        free_psnr: PSNR in dB of a run from the same noise without corrections and the picture; ``None`` if it was not
            measured.
        correction: root mean square of the corrections over that of the latents, the mean over the steps.
        note: why another method than the default was taken.
    """

    method: str
    calls: int
    seconds: float
    corrected_psnr: float
    free_psnr: float | None
    correction: float
    note: str = ""

    def __str__(self) -> str:
        free = "not measured" if self.free_psnr is None else f"{self.free_psnr:.1f} dB"
        lines = [
            f"inversion {self.method}, {self.calls} UNet calls backwards, {self.seconds:.2f} s in all",
            f"picture   {self.corrected_psnr:.1f} dB with corrections (the VAE's loss), {free} without",
            f"size      corrections are {self.correction:.1%} of the latents",
        ]
        if self.note:
            lines.append(f"note      {self.note}")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Loaded(Generation):
    """A picture of the user's, as a base like any other. Its ``image`` is the user's, pixel for pixel.

    Attributes:
        inversion: how it was loaded and how well it comes back.
        reconstruction: what the decoder makes of the final latents.
    """

    inversion: Inversion
    reconstruction: Image.Image = field(repr=False)


def load(
    driver: Driver,
    parts: Callable[[], Parts],
    image: pictures.ImageLike,
    prompt: str,
    *,
    negative_prompt: str | None,
    seed: int,
    num_inference_steps: int,
    guidance_scale: float,
    inversion: Method | DdimInversion,
    resize: bool,
    measure: bool,
    maps: int,
    options: Mapping[str, Any] | None,
) -> Loaded:
    """See :meth:`fisedit_compiler.Editor.load`; ``parts`` gives what is compiled, once the arguments are checked."""
    started = time.perf_counter()
    pipe = driver.pipe
    if not isinstance(inversion, DdimInversion) and inversion not in get_args(Method):
        raise ConfigError(f"inversion={inversion!r} is unknown; choose one of {', '.join(map(repr, get_args(Method)))}")
    if num_inference_steps < 1:
        raise ConfigError(f"num_inference_steps={num_inference_steps}; a run makes at least one step")
    pictures.check_encoder(pipe)
    unit, (height, width) = pictures.size_unit(pipe), driver.default_size
    picture = pictures.fit(pictures.read_picture(image), unit, height * width, resize=resize)
    settings = driver.settings(
        seed=seed,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        height=picture.height,
        width=picture.width,
        options=options,
    )
    with refusals.naming_schedule(pipe.scheduler, num_inference_steps):
        schedule = noise_schedule(pipe.scheduler, num_inference_steps, settings.options)
    if inversion != "edit-friendly" and inversion != "auto":
        schedule.check_invertible()
    compiled = parts()
    clean = pictures.encoded(pipe, picture)
    runs = _Runs(driver, prompt, negative_prompt, settings, schedule, clean, picture)
    way = runs.way(inversion, measure)

    keep = KeepLatents()
    follow = FollowPath(schedule.along(way.points, clean), keep)
    settings = replace(settings, corrections=runs.start(way.points))

    def run() -> tuple[Image.Image, torch.Tensor]:
        with driver.kept_start() as start:
            return driver.run(prompt, negative_prompt, settings, follow, "load"), start[0]

    (reconstruction, start), recordings = compiled.record(maps, run)
    corrections = replace(runs.start(way.points), steps=tuple(follow.steps))
    return Loaded(
        prompt=prompt,
        negative_prompt=negative_prompt,
        settings=replace(settings, corrections=corrections),
        image=picture,
        latents=tuple(keep.latents),
        initial_latents=start,
        recordings=recordings,
        reconstruction=reconstruction,
        inversion=Inversion(
            method=way.method,
            calls=way.calls,
            seconds=time.perf_counter() - started,
            corrected_psnr=psnr(reconstruction, picture),
            free_psnr=way.free_psnr,
            correction=_relative_size(follow.steps, keep.latents),
            note=way.note,
        ),
    )


@dataclass(frozen=True)
class _Way:
    """A path that was chosen: its points by timestep, what they cost, and why it was chosen."""

    method: str
    points: dict[float, torch.Tensor]
    calls: int
    free_psnr: float | None = None
    note: str = ""


@dataclass(frozen=True)
class _Runs:
    """The runs that come before the recorded one."""

    driver: Driver
    prompt: str
    negative_prompt: str | None
    settings: RunSettings
    schedule: NoiseSchedule
    clean: torch.Tensor
    picture: Image.Image

    def way(self, inversion: Method | DdimInversion, measure: bool) -> _Way:
        """The path asked for; with ``"auto"`` DDIM's if its free run gives the picture back."""
        if inversion == "edit-friendly":
            return self._edit_friendly(measure)
        if inversion == "auto" and self.schedule.prediction_type not in INVERTIBLE_PREDICTIONS:
            reason = f"a UNet that predicts {self.schedule.prediction_type!r} cannot be walked backwards"
            return self._edit_friendly(measure, note=reason)
        walked = self._walked(inversion if isinstance(inversion, DdimInversion) else DdimInversion())
        if not measure and inversion != "auto":
            return walked
        free = self._free_psnr(walked.points)
        if inversion == "auto" and not free >= NATURAL_PSNR:
            reason = f"DDIM's noise alone gives the picture back at {free:.1f} dB only: the model would not draw it so"
            return self._edit_friendly(measure, note=reason, calls=walked.calls)
        return replace(walked, free_psnr=free)

    def start(self, points: dict[float, torch.Tensor]) -> Corrections:
        """The noisiest point, as a pipeline takes it, and no corrections."""
        noisiest = points[float(self.schedule.levels[0].timestep)]
        return Corrections((noisiest.float() / self.schedule.start_scale).to(noisiest.dtype))

    def _edit_friendly(self, measure: bool, note: str = "", calls: int = 0) -> _Way:
        points = edit_friendly_path(self.clean, self.schedule, self.settings.seed)
        return _Way("edit-friendly", points, calls, self._free_psnr(points) if measure else None, note)

    def _walked(self, method: DdimInversion) -> _Way:
        """What DDIM's walk passes through."""
        points = edit_friendly_path(self.clean, self.schedule, self.settings.seed)
        walk = InverseWalk(self.schedule, method.rounds, from_first_level=method.noisy_start)
        if walk.num_calls:  # a run of one step has one level, and that has its noise
            start = self.schedule.at_first_level(points) if method.noisy_start else self.clean
            backwards = replace(
                self.settings,
                options={name: value for name, value in self.settings.options.items() if name not in SCHEDULE_OPTIONS},
                num_inference_steps=walk.num_calls,
                guidance_scale=method.guidance_scale,
                corrections=Corrections(start),
            )
            self.driver.run(self.prompt, self.negative_prompt, backwards, KeepLatents(), "invert", scheduler=walk)
        return _Way("ddim", points | walk.points, walk.num_calls)

    def _free_psnr(self, points: dict[float, torch.Tensor]) -> float:
        free = replace(self.settings, corrections=self.start(points))
        return psnr(self.driver.run(self.prompt, self.negative_prompt, free, KeepLatents(), "measure"), self.picture)


def _relative_size(steps: list[torch.Tensor], latents: list[torch.Tensor]) -> float:
    sizes = [
        float(step.float().square().mean().sqrt() / after.float().square().mean().sqrt().clamp_min(1e-12))
        for step, after in zip(steps, latents, strict=True)
    ]
    return sum(sizes) / max(len(sizes), 1)
