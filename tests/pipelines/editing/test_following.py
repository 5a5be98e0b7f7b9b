"""Runs that would be blamed wrongly: who changed the scheduler, who stopped the run, whose noise it was."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from itertools import count
from types import MethodType
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.configuration_utils import register_to_config

from fisedit_compiler.errors import ConfigError, RecordingError
from fisedit_compiler.pipelines import Editor, Generation, LatentDifference
from fisedit_compiler.pipelines.running import run_scheduler
from fisedit_compiler.pipelines.running.copies import LOOKED_AT

Generate = Callable[..., Generation]

# NumPy's own warning, from schedulers that interpolate tensors with it.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")


def scheduler_names() -> list[str]:
    """Every scheduler of diffusers whose packages are installed."""
    found = {name: getattr(diffusers.schedulers, name) for name in dir(diffusers.schedulers)}
    return [
        name
        for name, one in found.items()
        if isinstance(one, type) and "dummy" not in one.__module__ and hasattr(one, "set_timesteps")
    ]


def box() -> torch.Tensor:
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[4:12, 3:9] = True
    return mask


@pytest.mark.parametrize("name", scheduler_names())
def test_every_scheduler_that_drives_the_stock_pipeline_drives_the_editor(
    name: str, pinned_editor: Editor, generate: Generate
) -> None:
    pipe = pinned_editor.pipe
    try:
        pipe.scheduler = getattr(diffusers.schedulers, name)()
        pipe("a cat", num_inference_steps=5, generator=torch.Generator().manual_seed(3), output_type="latent")
    except Exception as error:
        pytest.skip(f"the stock pipeline does not run with it: {error}")
    for steps in (5, 6):
        pipe.scheduler = getattr(diffusers.schedulers, name)()
        before = dict(pipe.scheduler.config)
        base = generate(num_inference_steps=steps)
        assert dict(pipe.scheduler.config) == before
        edits = [pinned_editor.edit(base, "a dog", mask=box()) for _ in range(2)]
        assert torch.equal(edits[0].latents[-1], edits[1].latents[-1])
        assert edits[0].unchanged_outside and edits[0].report.restored_steps == 0


def test_a_run_beside_the_editor_may_write_the_schedulers_own_settings(
    pinned_editor: Editor, generate: Generate
) -> None:
    """Told an odd number of steps, it switches `lower_order_final` on; for an even one that is another path."""
    pipe = pinned_editor.pipe
    pipe.scheduler = diffusers.DPMSolverSinglestepScheduler(lower_order_final=False, final_sigmas_type="sigma_min")
    odd, even = generate(num_inference_steps=5), generate(num_inference_steps=6)
    pipe("a fox", num_inference_steps=5)
    assert pipe.scheduler.config.lower_order_final
    assert pinned_editor.edit(odd, "a dog", mask=box()).unchanged_outside
    with pytest.raises(RecordingError, match="lower_order_final False -> True"):
        pinned_editor.edit(even, "a dog", mask=box())


def test_what_a_scheduler_remembers_of_the_last_run_reaches_no_other(pinned_editor: Editor, generate: Generate) -> None:
    class Remembering(DDIMScheduler):
        steps = 0

        def step(self, model_output: Any, timestep: Any, sample: Any, **options: Any) -> Any:
            self.steps += 1
            return super().step(model_output * (1 + 0.01 * self.steps), timestep, sample, **options)

    pipe = pinned_editor.pipe
    pipe.scheduler = Remembering(clip_sample=False)
    base, same = generate(), generate()
    assert torch.equal(base.latents[-1], same.latents[-1])
    assert pinned_editor.edit(base, "a dog", mask=box()).unchanged_outside
    assert pipe.scheduler.steps == 0


def stop_at(pipe: Any, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """What a stop button does: the flag is set while the UNet is called for the ``call``-th time."""
    calls = 0

    def press(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            pipe._interrupt = True

    unet = pipe.unet.original
    handle = unet.register_forward_pre_hook(press)
    monkeypatch.setattr(unet, "released", handle.remove, raising=False)


@pytest.mark.parametrize("call", [1, 3, 6])
def test_a_stopped_base_is_not_kept(
    call: int, pinned_editor: Editor, generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pinned_editor.prepare().pipe
    stop_at(pipe, monkeypatch, call)
    with pytest.raises(RecordingError, match=rf"\(generate\) was stopped after {call} of 7 steps.*_interrupt"):
        generate()
    pipe.unet.original.released()
    assert len(generate().latents) == 7


@pytest.mark.parametrize("mask", [box(), LatentDifference(everywhere_ratio=1.0)], ids=["drawn", "automatic"])
def test_a_stopped_edit_leaves_its_base_alone(
    mask: Any, pinned_editor: Editor, generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = generate()
    expected = pinned_editor.edit(base, "a dog", mask=mask)
    stop_at(pinned_editor.pipe, monkeypatch, 4)
    with pytest.raises(RecordingError, match=r"\(edit\) was stopped after 4 of 7 steps"):
        pinned_editor.edit(base, "a dog", mask=mask)
    pinned_editor.pipe.unet.original.released()
    again = pinned_editor.edit(base, "a dog", mask=mask)
    assert torch.equal(again.latents[-1], expected.latents[-1])


def test_a_stop_after_the_last_step_stops_nothing(
    pinned_editor: Editor, generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(pinned_editor.prepare().pipe, monkeypatch, 7)
    assert len(generate().latents) == 7


def test_a_stopped_dense_run_is_no_dense_run(
    pinned_editor: Editor, generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = generate()
    stop_at(pinned_editor.pipe, monkeypatch, 2)
    with pytest.raises(RecordingError, match=r"\(dense\) was stopped after 2 of 7"):
        pinned_editor.dense(base, "a dog")


class ByChance(DDIMScheduler):
    """Adds noise of its own kind after every step."""

    def step(self, model_output: Any, timestep: Any, sample: Any, **options: Any) -> Any:
        (result, *more) = super().step(model_output, timestep, sample, **options)
        return (result + 0.1 * self.noise(sample), *more)

    def noise(self, sample: torch.Tensor) -> torch.Tensor:
        return torch.randn(sample.shape)


class Sampled(ByChance):
    """Draws as ``DPMSolverSDEScheduler`` does: a sampler for each picture, from a seed that may be left to chance."""

    @register_to_config
    def __init__(self, clip_sample: bool = False, noise_sampler_seed: int | None = None) -> None:
        super().__init__(clip_sample=clip_sample)
        self.register_to_config(noise_sampler_seed=noise_sampler_seed)
        self.noise_sampler_seed = noise_sampler_seed

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self.samplers: list[torch.Generator] | None = None

    def noise(self, sample: torch.Tensor) -> torch.Tensor:
        seed: Any = self.noise_sampler_seed
        if self.samplers is None:
            seed = torch.randint(0, 2**31, []).item() if seed is None else seed
            self.samplers = [torch.Generator().manual_seed(one) for one in (seed if isinstance(seed, list) else [seed])]
        shape = sample.shape if len(self.samplers) == 1 else sample.shape[1:]
        return torch.stack([torch.randn(shape, generator=one) for one in self.samplers]).reshape(sample.shape)


def test_a_scheduler_that_draws_by_chance_is_refused_at_its_first_step(
    pinned_editor: Editor, generate: Generate
) -> None:
    pinned_editor.pipe.scheduler = ByChance(clip_sample=False)
    with pytest.raises(ConfigError, match=r"ByChance\.step\(\) drew random numbers of its own.*generator"):
        generate()


def test_noise_of_numpy_is_by_chance_too(
    pinned_editor: Editor, generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        ByChance, "noise", lambda self, sample: torch.from_numpy(np.random.standard_normal(sample.shape)).float()
    )
    pinned_editor.pipe.scheduler = ByChance(clip_sample=False)
    with pytest.raises(ConfigError, match="drew random numbers of its own"):
        generate()


class ByChanceLate(ByChance):
    """Draws in its fifth step only."""

    steps = 0

    def noise(self, sample: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        return torch.randn(sample.shape) if self.steps == 5 else torch.zeros_like(sample)


def test_a_scheduler_of_somebody_is_looked_at_in_every_step(pinned_editor: Editor, generate: Generate) -> None:
    pinned_editor.pipe.scheduler = ByChanceLate(clip_sample=False)
    with pytest.raises(ConfigError, match=r"ByChanceLate\.step\(\) drew random numbers of its own"):
        generate(num_inference_steps=6)


def draw_late(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, whose fifth call draws a number."""
    calls = count(1)

    @wraps(method)
    def drawing(*args: Any, **options: Any) -> Any:
        if next(calls) == 5:
            torch.randn(1)
        return method(*args, **options)

    return drawing


@pytest.mark.parametrize("name", ["step", "_get_variance"])
@pytest.mark.parametrize("on_class", [True, False])
def test_what_somebody_put_into_a_scheduler_is_looked_at_in_every_step(
    name: str, on_class: bool, pinned_editor: Editor, generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = pinned_editor.pipe.scheduler
    held = dict(vars(scheduler))
    owner = type(scheduler) if on_class else scheduler
    monkeypatch.setattr(owner, name, drawn := draw_late(getattr(owner, name)))
    with pytest.raises(ConfigError, match=r"Scheduler\.step\(\) drew random numbers of its own"):
        generate(num_inference_steps=6)
    assert vars(scheduler) == (held if on_class else {**held, name: drawn})


def test_a_step_that_is_given_no_generator_is_named(pinned_editor: Editor, generate: Generate) -> None:
    """Pipelines look at the signature of a step, and a function around it may hide the argument."""
    pipe = pinned_editor.pipe
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **options: step(*args, **options)
    with pytest.raises(ConfigError, match=r"without an argument `generator`.*functools\.wraps of the step"):
        generate()
    pipe.scheduler.step = wraps(step)(pipe.scheduler.step)
    generate()


@pytest.mark.parametrize("kind", [np.random.MT19937, np.random.PCG64])
def test_one_number_of_numpy_is_noticed_whatever_draws_it(
    kind: Any, pinned_editor: Editor, generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(kind(1))
    try:
        generate()
        monkeypatch.setattr(ByChance, "noise", lambda self, sample: sample * np.random.standard_normal())
        pinned_editor.pipe.scheduler = ByChance(clip_sample=False)
        for _ in range(2):  # numbers come in pairs
            with pytest.raises(ConfigError, match="drew random numbers of its own"):
                generate()
    finally:
        np.random.set_bit_generator(before)


def test_a_scheduler_that_was_read_is_looked_at_for_numpy_in_its_first_steps(
    pinned_editor: Editor, generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[bool] = []
    states = run_scheduler._global_states

    def looking(device: torch.device | None, *, of_numpy: bool) -> tuple[bytes, ...]:
        looks.append(of_numpy)
        return states(device, of_numpy=of_numpy)

    monkeypatch.setattr(run_scheduler, "_global_states", looking)
    generate(num_inference_steps=6)
    assert looks == [True] * 2 * LOOKED_AT + [False] * 2 * (6 - LOOKED_AT)

    scheduler = pinned_editor.pipe.scheduler
    scheduler.step = MethodType(lambda self, *args, **kwargs: type(self).step(self, *args, **kwargs), scheduler)
    looks.clear()
    generate(num_inference_steps=6)
    assert looks == [True] * 2 * 6


def test_a_function_in_the_place_of_a_method_is_of_the_scheduler_that_it_was_made_of(
    pinned_editor: Editor, generate: Generate
) -> None:
    scheduler = pinned_editor.pipe.scheduler
    expected = generate().latents[-1]
    step, seen = scheduler.step, []

    def noting(*args: Any, **options: Any) -> Any:
        seen.append(args[1])
        return step(*args, **options)

    scheduler.step = noting
    held = dict(vars(scheduler))
    for _ in range(2):
        assert torch.equal(generate().latents[-1], expected)
        assert vars(scheduler) == held, "nothing is left of a run"
    assert seen


@pytest.mark.parametrize("own", [None, 11])
def test_a_noise_sampler_gets_the_runs_seed(own: int | None, pinned_editor: Editor, generate: Generate) -> None:
    pipe = pinned_editor.pipe
    pipe.scheduler = Sampled(noise_sampler_seed=own)
    base = generate()
    assert torch.equal(base.latents[-1], generate().latents[-1])
    assert torch.equal(base.latents[-1], generate(seed=4).latents[-1]) is False
    edits = [pinned_editor.edit(base, "a dog", mask=box()) for _ in range(2)]
    assert torch.equal(edits[0].latents[-1], edits[1].latents[-1])
    assert edits[0].unchanged_outside and edits[0].report.restored_steps == 0
    assert pipe.scheduler.config.noise_sampler_seed == pipe.scheduler.noise_sampler_seed == own


def test_rescaled_guidance_is_refused_before_the_run(pinned_editor: Editor, generate: Generate) -> None:
    for steps in (1, 5):
        with pytest.raises(ConfigError, match=r"guidance_rescale=0\.7 divides by a deviation over all sites"):
            generate(num_inference_steps=steps, options={"guidance_rescale": 0.7})
    assert not pinned_editor._parts.are_compiled
    assert generate(options={"guidance_rescale": 0.0}).latents


def test_dynamic_thresholding_is_refused_before_the_run(pinned_editor: Editor, generate: Generate) -> None:
    pinned_editor.pipe.scheduler = DDIMScheduler(thresholding=True, clip_sample=False)
    with pytest.raises(ConfigError, match="thresholding=True, which divides by a quantile over all sites"):
        generate()


@pytest.mark.parametrize("steps", [1, 4])
def test_a_scheduler_that_mixes_all_sites_is_noticed_at_once(
    steps: int, pinned_editor: Editor, generate: Generate
) -> None:
    """Even in the last step, after which no UNet call looks at the latents again."""

    class Mixing(DDIMScheduler):
        def step(self, model_output: Any, timestep: Any, sample: Any, **options: Any) -> Any:
            return super().step(model_output / model_output.std(), timestep, sample, **options)

    pinned_editor.pipe.scheduler = Mixing(clip_sample=False)
    base = generate(num_inference_steps=steps)
    with pytest.raises(RecordingError, match="After step 1 latents outside the mask are not the base's"):
        pinned_editor.edit(base, "a dog", mask=box())
