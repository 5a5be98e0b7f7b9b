"""Paths from a picture to noise, held against the schedulers of diffusers."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from fisedit_compiler.errors import ConfigError
from fisedit_compiler.pipelines.inversion.noise_paths import InverseWalk, edit_friendly_path, noise_schedule

STEPS = 10
CLEAN = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}


def make(name: str, **config: Any) -> Any:
    options = {"clip_sample": False} if name in ("DDIMScheduler", "DDPMScheduler") else {}
    return getattr(diffusers, name)(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **options, **config
    )


def walk(schedule: Any, model: Any, start: torch.Tensor, **options: Any) -> InverseWalk:
    """Drive the walk as a pipeline does."""
    found = InverseWalk(schedule, **options)
    found.set_timesteps(found.num_calls)
    latents = start
    for timestep in found.timesteps:
        latents = found.step(model(found.scale_model_input(latents, timestep)), timestep, latents)[0]
    return found


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_levels_are_those_the_scheduler_adds_noise_by(name: str) -> None:
    scheduler = make(name)
    schedule = noise_schedule(scheduler, STEPS)
    assert len(schedule.levels) == STEPS
    scheduler.set_timesteps(STEPS)
    noise = torch.randn(CLEAN.shape, generator=torch.Generator().manual_seed(1))
    for level in schedule.levels:
        expected = scheduler.add_noise(CLEAN, noise, level.timestep[None])
        torch.testing.assert_close(level.signal * CLEAN + level.noise * noise, expected)


def test_asking_leaves_the_scheduler_alone() -> None:
    scheduler = make("EulerDiscreteScheduler")
    scheduler.set_timesteps(3)
    before = scheduler.timesteps.clone()
    noise_schedule(scheduler, STEPS)
    assert torch.equal(scheduler.timesteps, before)


@pytest.mark.parametrize("config", [{}, {"prediction_type": "v_prediction"}, ZERO_SNR], ids=["eps", "v", "zero-snr"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_the_walk_undoes_ddims_steps(name: str, config: dict[str, Any]) -> None:
    """Under a prediction that does not depend on the latents, one round is exact; Euler's steps are DDIM's, scaled."""
    prediction = torch.randn(CLEAN.shape, generator=torch.Generator().manual_seed(2))
    scheduler = make(name, **config)
    if name == "DDIMScheduler":
        scheduler.register_to_config(set_alpha_to_one=True)
        scheduler.final_alpha_cumprod = torch.tensor(1.0)
    schedule = noise_schedule(scheduler, STEPS)
    points = walk(schedule, lambda _: prediction, CLEAN).points
    scheduler.set_timesteps(STEPS)
    path = schedule.along(points, CLEAN)
    latents = points[float(schedule.levels[0].timestep)]
    for timestep, expected in zip(scheduler.timesteps, path, strict=True):
        scheduler.scale_model_input(latents, timestep)
        latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
        torch.testing.assert_close(latents, expected, rtol=1e-3, atol=2e-3)


def test_more_rounds_come_nearer_to_the_fixed_point() -> None:
    scheduler = make("DDIMScheduler")
    schedule = noise_schedule(scheduler, STEPS)

    def distance(rounds: int) -> float:
        points = walk(schedule, torch.tanh, CLEAN, rounds=rounds).points
        scheduler.set_timesteps(STEPS)
        latents = points[float(scheduler.timesteps[0])]
        for timestep in scheduler.timesteps:
            latents = scheduler.step(torch.tanh(latents), timestep, latents, return_dict=False)[0]
        return float((latents - CLEAN).norm())

    assert distance(4) < 0.5 * distance(2) < 0.5 * distance(1)


def test_a_walk_from_the_first_level_leaves_that_level_out() -> None:
    schedule = noise_schedule(make("DDIMScheduler"), STEPS)
    points = edit_friendly_path(CLEAN, schedule, seed=0)
    found = walk(schedule, torch.zeros_like, schedule.at_first_level(points), from_first_level=True)
    assert found.num_calls == STEPS - 1
    assert set(points) - set(found.points) == {float(schedule.levels[-1].timestep)}
    last, first = (schedule.levels[number] for number in (0, -1))
    # Without any noise predicted the signal is all there is, and it shrinks as the schedule says.
    expected = points[float(first.timestep)] * last.signal / first.signal
    torch.testing.assert_close(found.points[float(last.timestep)], expected)


def test_edit_friendly_noise_is_independent_and_seeded() -> None:
    schedule = noise_schedule(make("DDIMScheduler"), STEPS)
    clean = torch.zeros(1, 4, 64, 64)
    points = edit_friendly_path(clean, schedule, seed=5)
    noises = torch.stack([points[float(level.timestep)].flatten() / level.noise for level in schedule.levels])
    assert torch.allclose(torch.corrcoef(noises), torch.eye(STEPS), atol=0.05)
    assert torch.allclose(noises.std(dim=1), torch.ones(STEPS), atol=0.05)
    again, other = (edit_friendly_path(clean, schedule, seed=seed) for seed in (5, 6))
    assert all(torch.equal(points[key], again[key]) and not torch.equal(points[key], other[key]) for key in points)


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "PNDMScheduler"])
def test_calls_at_one_level_share_their_point(name: str) -> None:
    schedule = noise_schedule(make(name, **({"skip_prk_steps": True} if name == "PNDMScheduler" else {})), STEPS)
    points = edit_friendly_path(CLEAN, schedule, seed=0)
    assert len(points) == STEPS < len(schedule.levels)
    path = schedule.along(points, CLEAN)
    assert len(path) == len(schedule.levels)
    assert path[0] is path[1]
    assert path[-1] is CLEAN


def test_what_cannot_be_done_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="add_noise"):
        noise_schedule(diffusers.IPNDMScheduler(), STEPS)
    restless = make("DDIMScheduler")
    restless.register_to_config(noise_sampler_seed=None)
    with pytest.raises(ConfigError, match="noise_sampler_seed"):
        noise_schedule(restless, STEPS)
    with pytest.raises(ConfigError, match="edit-friendly"):
        InverseWalk(noise_schedule(make("DDIMScheduler", prediction_type="sample"), STEPS))
    wrong = make("DDIMScheduler", **{**ZERO_SNR, "prediction_type": "epsilon"})
    with pytest.raises(ConfigError, match="pure noise"):
        walk(noise_schedule(wrong, STEPS), torch.zeros_like, CLEAN)
