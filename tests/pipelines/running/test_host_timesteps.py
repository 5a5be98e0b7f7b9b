"""Schedulers that look timesteps up on the host: the same steps bit for bit, and nothing of the user's is touched."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import diffusers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fisedit_compiler.pipelines.running import host_timesteps
from fisedit_compiler.pipelines.running.host_timesteps import LOOKING_UP, read_on_host
from fisedit_compiler.pipelines.running.run_scheduler import scheduler_of_a_run
from tests.support.tiny_pipeline import make_tiny_pipeline
from tests.support.waits import Waits, watched

# NumPy's own warning, from schedulers that interpolate tensors with it.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
STEPS = 5
SIZE = 1 * 4 * 8 * 8


def run(scheduler: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Samples and scaled samples of a short run, as a pipeline drives a scheduler."""
    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(STEPS, device="cpu")
    sample = torch.randn(1, 4, 8, 8, generator=generator) * scheduler.init_noise_sigma
    options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    samples, scaled = [], []
    for timestep in scheduler.timesteps:
        scaled.append(scheduler.scale_model_input(sample, timestep))
        sample = scheduler.step(torch.sin(3.0 * scaled[-1]), timestep, sample, **options, return_dict=False)[0]
        samples.append(sample)
    return samples, scaled


def made(name: str) -> Any:
    options = {"noise_sampler_seed": 0} if name == "DPMSolverSDEScheduler" else {}
    try:
        return getattr(diffusers, name)(**options)
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every timestep counts as the device's."""
    monkeypatch.setattr(host_timesteps, "is_away", lambda value: True)


@pytest.mark.usefixtures("away")
@pytest.mark.parametrize("name", sorted(LOOKING_UP))
def test_steps_are_the_same_bit_for_bit(name: str) -> None:
    expected, expected_scaled = run(made(name))
    found, scaled = run(read_on_host(made(name)))
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, scaled, expected_scaled))


@pytest.mark.parametrize("name", sorted(LOOKING_UP))
def test_no_step_reads_a_timestep_of_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with watched() as waits:
        monkeypatch.setattr(host_timesteps, "is_away", waits.is_marked)
        scheduler = made(name)
        set_timesteps = scheduler.set_timesteps

        def on_device(*args: Any, **kwargs: Any) -> None:
            set_timesteps(*args, **kwargs)
            waits.mark(scheduler.timesteps)

        scheduler.set_timesteps = on_device
        run(read_on_host(scheduler))
    assert {wait.function for wait in waits.found} == {"noted"}


class _Mixing(TorchDispatchMode):
    """Operations that take numbers computed from a timestep on the host together with what is on the device."""

    def __init__(self, timesteps: Waits) -> None:
        super().__init__()
        self.timesteps, self.mixed, self.served = timesteps, set[str](), False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [value for value in tree_leaves((args, kwargs or {})) if isinstance(value, torch.Tensor)]
        is_of_host = any(map(self.timesteps.is_marked, given))
        self.served = self.served or is_of_host
        if is_of_host and any(value.numel() == SIZE for value in given):
            self.mixed.add(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.usefixtures("away")
@pytest.mark.parametrize("name", sorted(LOOKING_UP))
def test_no_step_computes_with_a_timestep_of_the_host(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a coefficient could be rounded otherwise than on the device. An index leaves no mark on what it chose."""
    with watched() as waits, _Mixing(waits) as mixing:
        entered = host_timesteps._HostTimesteps._on_host

        def marking(self: Any) -> Any:
            waits.mark(self._host)
            return entered(self)

        monkeypatch.setattr(host_timesteps._HostTimesteps, "_on_host", marking)
        run(read_on_host(made(name)))
    assert mixing.served and not mixing.mixed


@pytest.mark.usefixtures("away")
def test_what_a_pipeline_sees_stays_where_it_was() -> None:
    scheduler = read_on_host(diffusers.DDIMScheduler())
    assert "device" in inspect.signature(scheduler.set_timesteps).parameters
    assert "eta" in inspect.signature(scheduler.step).parameters
    scheduler.set_timesteps(STEPS)
    timesteps = scheduler.timesteps
    seen: list[torch.Tensor] = []
    scheduler.alphas_cumprod = _Table(scheduler.alphas_cumprod, seen)
    sample = torch.ones(1, 4, 8, 8)
    scheduler.step(sample, timesteps[2], sample)
    assert scheduler.timesteps is timesteps
    assert seen and all(index.data_ptr() != timesteps[2].data_ptr() for index in seen)
    assert int(seen[0]) == int(timesteps[2])
    with pytest.raises(TypeError):
        scheduler.step(sample, timesteps[2])
    assert scheduler.timesteps is timesteps


class _Table:
    """A table that keeps what it was indexed by."""

    def __init__(self, values: torch.Tensor, seen: list[torch.Tensor]) -> None:
        self.values, self.seen = values, seen

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        self.seen.append(index)
        return self.values[index]


@pytest.mark.usefixtures("away")
@pytest.mark.parametrize(
    "other", [lambda timesteps: timesteps[1].clone(), lambda timesteps: int(timesteps[1])], ids=["copy", "number"]
)
def test_a_timestep_of_elsewhere_is_taken_as_it_is(other: Any) -> None:
    sample = torch.ones(1, 4, 8, 8)
    expected, scheduler = diffusers.DDIMScheduler(), read_on_host(diffusers.DDIMScheduler())
    expected.set_timesteps(STEPS)
    scheduler.set_timesteps(STEPS)
    timestep = other(scheduler.timesteps)
    assert torch.equal(
        scheduler.step(sample, timestep, sample).prev_sample, expected.step(sample, timestep, sample).prev_sample
    )


@pytest.mark.usefixtures("away")
def test_timesteps_that_were_written_to_are_read_again() -> None:
    sample = torch.ones(1, 4, 8, 8)
    expected, scheduler = diffusers.DDIMScheduler(), read_on_host(diffusers.DDIMScheduler())
    for one in (expected, scheduler):
        one.set_timesteps(STEPS)
        one.timesteps += 7
    results = [one.step(sample, one.timesteps[2], sample).prev_sample for one in (expected, scheduler)]
    assert torch.equal(*results)


def test_other_classes_and_the_users_own_object_stay_as_they_are() -> None:
    class Own(diffusers.DDIMScheduler):
        """Might compute with a timestep."""

    own = Own()
    before = dict(vars(own))
    assert read_on_host(own) is own and dict(vars(own)) == before
    pipe = make_tiny_pipeline()
    given = pipe.scheduler
    before = copy.copy(vars(given))
    with scheduler_of_a_run(pipe, seed=1):
        assert pipe.scheduler is not given
    assert pipe.scheduler is given and vars(given) == before
