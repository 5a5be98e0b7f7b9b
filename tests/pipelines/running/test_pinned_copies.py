"""Copies to the device start from pinned memory in a scheduler's step, and are the same copies."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from fisedit_compiler.pipelines.running import copies
from fisedit_compiler.pipelines.running.copies import LOOKED_AT, CopiesBehind
from fisedit_compiler.pipelines.running.run_scheduler import scheduler_of_a_run
from tests.support.tiny_pipeline import make_tiny_pipeline

BEHIND = torch.device("meta")
"""Stands for a device that computes behind the host: what is copied there is seen by its shape."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What was copied to pinned memory."""
    values: list[Tensor] = []
    monkeypatch.setattr(copies, "is_behind", lambda device: device.type == "meta")
    monkeypatch.setattr(copies, "pinned", lambda value: values.append(value) or value)
    return values


@pytest.mark.parametrize(
    "copy",
    [
        lambda value: value.to(BEHIND), lambda value: value.to("meta"), lambda value: value.to(device=BEHIND),
        lambda value: value.to(BEHIND, torch.float16), lambda value: value.to(dtype=torch.float16, device="meta"),
        lambda value: value.to(torch.empty(0, device=BEHIND)), lambda value: torch.tensor([1.0, 2.0], device=BEHIND),
        lambda value: torch.tensor([1.0, 2.0], dtype=torch.float16, device="meta"),
    ],
)  # fmt: skip
def test_copies_to_the_device(copy: Any, started: list[Tensor]) -> None:
    value = torch.tensor([1.0, 2.0])
    expected = copy(value)
    assert not started
    with CopiesBehind().block(BEHIND):
        found = copy(value)
    assert [one.tolist() for one in started] == [[1.0, 2.0]]
    assert (found.device, found.dtype, found.shape) == (expected.device, expected.dtype, expected.shape)
    copy(value)
    assert len(started) == 1


@pytest.mark.parametrize("value", [
    torch.tensor(3.0).expand(4), torch.ones(2, 1).expand(2, 3), torch.ones(3, 4).t(), torch.ones(3, 4)[:, ::2],
    torch.ones(0, 4), torch.tensor(3.0),
])  # fmt: skip
def test_a_value_of_any_layout_is_pinned(value: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own pinning makes memory of the same layout and copies to it, which it refuses of expanded ones."""

    def pin_memory(value: Tensor) -> Tensor:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(value)

    monkeypatch.setattr(copies, "is_behind", lambda device: device.type == "meta")
    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    assert torch.equal(copies.pinned(value), value)
    with CopiesBehind().block(BEHIND):
        found = value.to(BEHIND)
    assert found.stride() == value.to(BEHIND).stride()


@pytest.mark.parametrize(
    "other",
    [
        lambda value: value.to(torch.float16), lambda value: value.to("cpu"), lambda value: value.to(value),
        lambda value: value.to(BEHIND, non_blocking=True), lambda value: value.to(BEHIND, torch.float32, False),
        lambda value: torch.tensor([1.0]), lambda value: torch.tensor(3.0, device="cpu"), lambda value: value + 1,
        lambda value: torch.empty(2, device=BEHIND).to(torch.float16), lambda value: value.to_sparse().to(BEHIND),
        lambda value: torch.tensor(data=[1.0, 2.0], device=BEHIND),
    ],
)  # fmt: skip
def test_everything_else_is_as_it_was(other: Any, started: list[Tensor]) -> None:
    value = torch.tensor([1.0, 2.0])
    expected = other(value)
    with CopiesBehind().block(BEHIND):
        found = other(value)
    assert not started and found.dtype == expected.dtype and found.device == expected.device
    with CopiesBehind().block(torch.device("cpu")), CopiesBehind().block(None):
        value.to(BEHIND)
    assert not started


def test_blocks_of_which_the_first_copy_nothing_are_left_alone(started: list[Tensor]) -> None:
    value, copies = torch.tensor([1.0, 2.0]), CopiesBehind()
    for _ in range(LOOKED_AT):
        with copies.block(BEHIND):
            value + 1
    with copies.block(BEHIND):
        assert not torch._C._len_torch_function_stack() and value.to(BEHIND).device == BEHIND
    assert not started


@pytest.mark.parametrize("first", [0, LOOKED_AT - 1])
def test_one_copy_among_the_first_blocks_makes_all_be_looked_at(first: int, started: list[Tensor]) -> None:
    value, copies = torch.tensor([1.0, 2.0]), CopiesBehind()
    for block in range(LOOKED_AT + 3):
        with copies.block(BEHIND):
            if block == first or block > LOOKED_AT:
                value.to(BEHIND)
    assert len(started) == 3


def test_a_step_that_draws_noise_copies_it_behind(started: list[Tensor]) -> None:
    pipe = make_tiny_pipeline()
    pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler()
    sample = torch.empty(1, 4, 8, 8, device=BEHIND)
    with scheduler_of_a_run(pipe, seed=0):
        pipe.scheduler.set_timesteps(4)
        pipe.scheduler.step(
            sample, pipe.scheduler.timesteps[0], sample, generator=torch.Generator().manual_seed(5), return_dict=False
        )
    assert [value.shape for value in started] == [(1, 4, 8, 8)]
    assert torch.equal(started[0], torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5)))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler"])
def test_on_a_gpu_steps_are_the_same_and_wait_for_no_copy(name: str) -> None:
    def run(scheduler: Any, strict: bool) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        scheduler.set_timesteps(5, device="cuda")
        sample = torch.randn(1, 4, 32, 32, generator=generator).half().to("cuda") * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            torch.cuda.set_sync_debug_mode("error" if strict else "default")
            try:
                scaled = scheduler.scale_model_input(sample, timestep)
                sample = scheduler.step(torch.sin(scaled), timestep, sample, generator=generator, return_dict=False)[0]
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sample

    pipe = make_tiny_pipeline()
    pipe.scheduler = getattr(diffusers, name)()
    expected = run(getattr(diffusers, name)(), strict=False)
    with scheduler_of_a_run(pipe, seed=0):
        assert torch.equal(run(pipe.scheduler, strict=True), expected)
