"""No waiting in a step: the host never reads what is on the device while an edit runs, so the queue stays full."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch

from fisedit_compiler.pipelines import EarlyDifference, Editor
from fisedit_compiler.pipelines.editing.steps import FollowBase
from fisedit_compiler.runtime.sessions.agreement import CHECKED_AT_ONCE
from tests.support.tiny_pipeline import make_tiny_pipeline
from tests.support.waits import Wait, Waits, device_of, watched

# NumPy's own warning, from schedulers that interpolate tensors with it.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
STEPS = 6
SCHEDULERS = (
    "DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler", "PNDMScheduler",
)  # fmt: skip

ENTERING = ("key", "noted")
"""The look at the weights, and the copy of the timesteps."""
CHECKING = ("_judge",)
"""What was compared behind the launch; see :data:`CHECKED_AT_ONCE`."""


@pytest.fixture(scope="module")
def editor() -> Iterator[Editor]:
    with Editor(make_tiny_pipeline(), progress=False) as editor:
        yield editor


def box() -> torch.Tensor:
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[4:10, 3:9] = True
    return mask


def waits_of_an_edit(editor: Editor, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> Waits:
    """What an edit waits for, as if its base were on a CUDA device; the steps of ``found`` count from 0."""
    base = editor.generate("a cat", seed=3, num_inference_steps=STEPS)
    edited = FollowBase.__call__

    slots = [dict(call.slots.items()) for call in base.recording.calls]
    with device_of(editor.pipe, monkeypatch, base.latents, base.initial_latents, slots) as waits:

        def counted(follow: FollowBase, pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
            result = edited(follow, pipe, step, timestep, tensors)
            waits.step = step + 1
            return result

        monkeypatch.setattr(FollowBase, "__call__", counted)
        editor.edit(base, "a dog", **arguments)
    return waits


def in_steps(waits: Waits, first: int = 0) -> list[Wait]:
    """Those of a step of the run, from one step on."""
    return [wait for wait in waits.found if first <= wait.step < STEPS]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_steps_of_an_edit_wait_for_nothing(name: str, editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(editor.pipe, "scheduler", getattr(diffusers, name).from_config(editor.pipe.scheduler.config))
    waits = waits_of_an_edit(editor, monkeypatch, mask=box())
    assert in_steps(waits, first=CHECKED_AT_ONCE) == []
    assert {wait.function for wait in in_steps(waits)} <= {*ENTERING, *CHECKING}


def test_what_a_whole_edit_waits_for(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its start it looks at the weights of UNet and text encoder and copies the timesteps; at its end it reads the
    picture, the outcomes and the weights again."""
    waits = waits_of_an_edit(editor, monkeypatch, mask=box())
    counted = Counter(wait.function for wait in waits.found if wait.function not in CHECKING)
    assert counted == {"key": 3, "noted": 1, "pictures": 1, "restored_steps": 1}


def test_an_edit_that_looks_for_its_mask_reads_latents_once_a_dense_step(
    editor: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = EarlyDifference(clear=0.0, everywhere_ratio=1.0, max_calls=3)
    waits = waits_of_an_edit(editor, monkeypatch, mask=found, record=False)
    reads = [wait.step for wait in waits.found if wait.function == "difference_and_size"]
    assert reads == [0, 1, 2]
    assert in_steps(waits, first=3) == []
    assert {wait.function for wait in in_steps(waits, first=CHECKED_AT_ONCE)} == {"difference_and_size"}


def test_without_timesteps_on_the_host_schedulers_would_wait(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fisedit_compiler.pipelines.running.run_scheduler.read_on_host", lambda scheduler: scheduler)
    waits = in_steps(waits_of_an_edit(editor, monkeypatch, mask=box()), first=CHECKED_AT_ONCE)
    assert len(waits) >= 5 * (STEPS - CHECKED_AT_ONCE)
    assert {wait.function for wait in waits} == {"step", "_get_variance"}


@pytest.mark.parametrize(
    "read",
    [
        lambda value: value.sum().item(), lambda value: bool(value.any()), lambda value: value.tolist(),
        lambda value: value.cpu(), lambda value: value.to("cpu"), lambda value: value.numpy(),
        lambda value: value.nonzero(), lambda value: value[value > 0], lambda value: torch.equal(value, value + 1),
        lambda value: torch.arange(9)[value[0].long()], lambda value: float(value[0]), lambda value: int(value[0]),
        lambda value: [0, 1][value[0].long()], lambda value: value.unique(),
        lambda value: value.masked_select(value > 0),
        lambda value: value.view(-1)[1:].add(1).max().item(), lambda value: torch.ones(3).add_(value).sum().item(),
    ],
)  # fmt: skip
def test_whatever_reads_a_marked_value_is_found(read: Callable[[torch.Tensor], object]) -> None:
    value, other = torch.ones(3), torch.ones(3)
    with watched(value) as waits:
        read(other)
        assert waits.found == []
        read(value)
    assert len(waits.found) == 1


def test_what_was_copied_to_the_host_may_be_read() -> None:
    value = torch.ones(3)
    with watched(value) as waits:
        float((value * 2).cpu().sum())
        (value + 1).view(3, 1).expand(3, 2)
    assert [wait.operation for wait in waits.found] == ["Tensor.cpu"]


@contextmanager
def waiting_is_an_error(pipe: Any, unet: torch.nn.Module) -> Iterator[Counter[str]]:
    """Inside the block the steps of a run may not wait, from the calls on that are checked at once; counts calls."""
    made: Counter[str] = Counter()

    def strict_after_the_checks(*_: object) -> None:
        made["calls"] += 1
        torch.cuda.set_sync_debug_mode("error" if made["calls"] > CHECKED_AT_ONCE else "default")

    def decode(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        torch.cuda.set_sync_debug_mode("default")  # the steps are over
        return type(pipe.vae).decode(pipe.vae, latents, *args, **kwargs)

    handle = unet.register_forward_pre_hook(strict_after_the_checks)
    pipe.vae.decode = decode
    try:
        yield made
    finally:
        torch.cuda.set_sync_debug_mode("default")
        handle.remove()
        del pipe.vae.decode


@pytest.mark.gpu
def test_steps_of_an_edit_are_no_error_where_waiting_is_one() -> None:
    """The same by CUDA itself, which also sees copies to the device."""
    pipe = make_tiny_pipeline().to("cuda")
    with Editor(pipe, progress=False) as editor:
        base = editor.generate("a cat", seed=3, num_inference_steps=STEPS)
        editor.edit(base, "a dog", mask=box())  # compiles and captures
        with waiting_is_an_error(pipe, editor.compiled) as made:
            edit = editor.edit(base, "a fox", mask=box())
    assert made["calls"] == STEPS
    assert edit.unchanged_outside and edit.report.sparse_calls + edit.report.shallow_calls == STEPS


@pytest.mark.gpu
def test_nor_are_those_of_a_base_and_its_timesteps_are_known_afterwards() -> None:
    pipe = make_tiny_pipeline().to("cuda")
    with Editor(pipe, progress=False) as editor:
        first, _ = (editor.generate("a cat", seed=3, num_inference_steps=STEPS) for _ in range(2))  # compiles
        with waiting_is_an_error(pipe, editor.compiled) as made:
            base = editor.generate("a fox", seed=3, num_inference_steps=STEPS)
        edit = editor.edit(base, "a dog", mask=box())
    assert made["calls"] == STEPS and edit.unchanged_outside
    timesteps = [[call.timestep for call in one.recording.calls] for one in (first, base) if one.recording]
    assert timesteps[0] == timesteps[1] and None not in timesteps[0] and len(set(timesteps[0])) == STEPS
