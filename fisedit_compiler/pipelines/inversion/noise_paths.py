"""From a clean latent to noise: the two paths a loaded picture's run can be made to follow.

``edit_friendly_path`` draws every level's noise anew (Huberman-Spiegelglas et al., CVPR 2024); ``InverseWalk`` walks
DDIM's steps backwards (Song et al., ICLR 2021; Dhariwal and Nichol, NeurIPS 2021). Both ask the scheduler what a noise
level means by letting it add noise to ones and zeros, so they hold for schedulers that keep latents at unit variance
(DDIM, DPM++) and for those that let them grow (Euler).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from fisedit_compiler.errors import ConfigError

INVERTIBLE_PREDICTIONS = ("epsilon", "v_prediction")
SCHEDULE_OPTIONS = ("timesteps", "sigmas", "original_inference_steps")
"""Arguments of a pipeline's call that decide at which noise levels it runs, beside the number of steps."""


@dataclass(frozen=True)
class NoiseLevel:
    """What a timestep means: latents are ``signal * clean + noise * standard normal`` there.

    Attributes:
        timestep: as the scheduler has it, a number without axes.
        signal: in the scheduler's own scale.
        noise: likewise.
    """

    timestep: torch.Tensor
    signal: float
    noise: float

    @property
    def scale(self) -> float:
        """Standard deviation of latents of unit variance; the UNet sees them divided by it."""
        return math.hypot(self.signal, self.noise)


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise levels of one run.

    Attributes:
        levels: one per UNet call, the noisiest first; a scheduler that calls the UNet twice at a level has it twice.
        start_scale: what the pipeline multiplies the latents it is given by.
        prediction_type: what the UNet predicts.
    """

    levels: Sequence[NoiseLevel]
    start_scale: float
    prediction_type: str

    def check_invertible(self) -> None:
        """Refuse a UNet whose steps cannot be taken back.

        Raises:
            ConfigError: it predicts neither noise nor v.
        """
        if self.prediction_type not in INVERTIBLE_PREDICTIONS:
            raise ConfigError(
                f"a UNet that predicts {self.prediction_type!r} cannot be walked backwards (its last step forgets the "
                'latents); use inversion="edit-friendly"'
            )

    def at_first_level(self, points: dict[float, torch.Tensor]) -> torch.Tensor:
        """The point at the least noisy level, at unit variance."""
        level = self.distinct()[0]
        point = points[float(level.timestep)]
        return (point.float() / level.scale).to(point.dtype)

    def distinct(self) -> list[NoiseLevel]:
        """The levels without repetitions, the least noisy first."""
        found = {float(level.timestep): level for level in self.levels}
        return [found[timestep] for timestep in sorted(found)]

    def along(self, points: dict[float, torch.Tensor], clean: torch.Tensor) -> list[torch.Tensor]:
        """Latents after every step: those of the next call's level, and ``clean`` after the last."""
        return [points[float(level.timestep)] for level in self.levels[1:]] + [clean]


def noise_schedule(scheduler: Any, num_inference_steps: int, options: Mapping[str, Any] | None = None) -> NoiseSchedule:
    """Ask a scheduler for its noise levels; it is left as it was.

    Args:
        scheduler: of the pipeline.
        num_inference_steps: of the run.
        options: further arguments of the pipeline's call, of which :data:`SCHEDULE_OPTIONS` reach the scheduler.

    Raises:
        ConfigError: it cannot add noise to a given latent, or it draws noise that nobody seeds.
    """
    name = type(scheduler).__name__
    if not callable(getattr(scheduler, "add_noise", None)):
        raise ConfigError(
            f"{name} has no add_noise(), so a picture cannot be put on its path; use DDIM, DPM++ or Euler"
        )
    config = scheduler.config
    if "noise_sampler_seed" in config and config["noise_sampler_seed"] is None:
        raise ConfigError(
            f"{name} draws other noise in every run, so no run follows another; set noise_sampler_seed, or use DDIM, "
            "DPM++ or Euler"
        )
    asked = copy.deepcopy(scheduler)
    asked_for = {name: (options or {}).get(name) for name in SCHEDULE_OPTIONS}
    asked_for = {name: value for name, value in asked_for.items() if value is not None}
    if not asked_for.keys() & {"timesteps", "sigmas"}:  # they say how many steps there are
        asked_for["num_inference_steps"] = num_inference_steps
    asked.set_timesteps(**asked_for, device="cpu")
    ones = torch.ones(1, 1, 1, 1, dtype=torch.float64, device="cpu")
    levels = []
    for timestep in asked.timesteps:
        signal = float(asked.add_noise(ones, 0 * ones, timestep[None]))
        noise = float(asked.add_noise(0 * ones, ones, timestep[None]))
        levels.append(NoiseLevel(timestep, signal, noise))
    return NoiseSchedule(levels, float(asked.init_noise_sigma), str(config.get("prediction_type", "epsilon")))


def edit_friendly_path(clean: torch.Tensor, schedule: NoiseSchedule, seed: int) -> dict[float, torch.Tensor]:
    """Latents of ``clean`` at every level, each with noise of its own.

    Returns:
        By timestep, tensors like ``clean``, in the scheduler's scale.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    points = {}
    for level in reversed(schedule.distinct()):
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        points[float(level.timestep)] = (level.signal * clean.float() + level.noise * noise).to(clean.dtype)
    return points


class InverseWalk:
    """DDIM backwards, as a scheduler: a stock pipeline that is given clean latents ends at noise.

    A DDIM step is linear in its latents ``x`` and the prediction ``m``: ``x' = keep * x + use * m(x)``. Backwards
    ``x = (x' - use * m(x)) / keep``, with ``x`` on both sides: it is found by iteration that starts at ``x'``. One
    round is the usual DDIM inversion; more follow Pan et al., "Effective Real Image Editing with Accelerated Iterative
    Diffusion Inversion", ICCV 2023. At zero terminal signal nothing is divided by it.

    Args:
        schedule: the levels to walk through.
        rounds: UNet calls at every level.
        from_first_level: the latents given are at the least noisy level instead of clean.

    Attributes:
        points: what the walk has passed through so far, by timestep, in the scheduler's scale.

    Raises:
        ConfigError: the UNet predicts something a step cannot be taken back from.
    """

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, schedule: NoiseSchedule, rounds: int = 1, *, from_first_level: bool = False) -> None:
        self.points: dict[float, torch.Tensor] = {}
        self.config = SimpleNamespace(prediction_type=schedule.prediction_type)
        levels = schedule.distinct()
        self._levels = levels[1:] if from_first_level else levels
        self._lower_levels = levels[:-1] if from_first_level else [None, *levels[:-1]]
        self._rounds = rounds
        self._calls = 0
        self._lower: torch.Tensor | None = None
        self.timesteps = torch.tensor([])
        if self._levels:
            self.timesteps = torch.stack([level.timestep for level in self._levels]).repeat_interleave(rounds)
        schedule.check_invertible()

    @property
    def num_calls(self) -> int:
        """UNet calls a whole walk makes, and the number of steps to ask a pipeline for."""
        return len(self.timesteps)

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **others: Any) -> None:
        """The levels are known already; only the device is taken. A pipeline may hand on what its scheduler takes."""
        self.timesteps = self.timesteps.to(device)

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The walk keeps latents at unit variance, as the UNet wants them."""
        return sample

    def step(
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, return_dict: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One round for one level; returns its latents at unit variance, twice for pipelines that decode the second."""
        number, round_number = divmod(self._calls, self._rounds)
        if round_number == 0:
            self._lower = sample.float()
        assert self._lower is not None
        level = self._levels[number]
        keep, use = self._coefficients(level, self._lower_levels[number])
        found = (self._lower - use * model_output.float()) / keep
        self._calls += 1
        self.points[float(level.timestep)] = (found * level.scale).to(sample.dtype)
        found = found.to(sample.dtype)
        return found, found

    def _coefficients(self, level: NoiseLevel, lower: NoiseLevel | None) -> tuple[float, float]:
        signal, noise = level.signal / level.scale, level.noise / level.scale
        lower_signal, lower_noise = (
            (1.0, 0.0) if lower is None else (lower.signal / lower.scale, lower.noise / lower.scale)
        )
        if self.config.prediction_type == "v_prediction":
            return lower_signal * signal + lower_noise * noise, lower_noise * signal - lower_signal * noise
        if signal <= 0.0:
            raise ConfigError(
                "the scheduler ends in pure noise, but the UNet predicts epsilon, which says nothing there; put the "
                "scheduler the model was trained with back"
            )
        return lower_signal / signal, lower_noise - lower_signal * noise / signal
