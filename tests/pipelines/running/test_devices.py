"""In a run of the Editor a pipeline finds its device quickly: the one that it would find itself."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from fisedit_compiler.pipelines.editing.driver import Driver
from fisedit_compiler.pipelines.editing.steps import KeepLatents
from fisedit_compiler.pipelines.running.devices import device_looked_up, device_of_run
from tests.support.tiny_pipeline import make_tiny_pipeline


@pytest.fixture
def pipe() -> Any:
    return make_tiny_pipeline()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One for every module that diffusers looks for hooks in by its own way."""
    from diffusers.hooks import group_offloading

    found: list[str] = []
    own = group_offloading._get_group_onload_device

    def noted(module: torch.nn.Module) -> torch.device:
        found.append(type(module).__name__)
        device: torch.device = own(module)
        return device

    monkeypatch.setattr(group_offloading, "_get_group_onload_device", noted)
    return found


def test_it_is_the_pipelines_own(pipe: Any, asked: list[str]) -> None:
    own = pipe._execution_device
    asked.clear()
    with device_looked_up(pipe):
        assert pipe._execution_device == own == torch.device("cpu") and asked == []
        assert isinstance(pipe, StableDiffusionPipeline)
        assert (type(pipe).__name__, type(pipe).__module__) == (
            StableDiffusionPipeline.__name__,
            StableDiffusionPipeline.__module__,
        )
    assert type(pipe) is StableDiffusionPipeline


def _hook(module: torch.nn.Module) -> None:
    module._hf_hook = SimpleNamespace(execution_device="meta")  # type: ignore[assignment]


def _offload_groups(pipe: Any) -> None:
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        pipe.unet,
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
        use_stream=False,
    )


def _on_several(pipe: Any) -> None:
    pipe.text_encoder.to("meta")


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe: _hook(pipe.unet),
        lambda pipe: [_hook(part) for part in pipe.vae.modules()],
        lambda pipe: [_hook(part) for part in pipe.text_encoder.modules()],
        _offload_groups,
        _on_several,
        lambda pipe: pipe.to("meta"),
    ],
    ids=["model offload", "vae offload", "sequential offload", "group offload", "several devices", "meta"],
)
def test_it_is_the_pipelines_own_wherever_its_models_are(pipe: Any, change: Any) -> None:
    change(pipe)
    own = pipe._execution_device
    with device_looked_up(pipe):
        assert pipe._execution_device == own
        assert device_of_run(pipe) in (None, own)


def test_hooks_that_come_and_go_in_a_run_are_seen(pipe: Any) -> None:
    with device_looked_up(pipe):
        assert pipe._execution_device == torch.device("cpu")
        for part in pipe.unet.modules():
            _hook(part)
        expected = DiffusionPipeline._execution_device.fget(pipe)
        assert pipe._execution_device == expected and device_of_run(pipe) is None
        for part in pipe.unet.modules():
            del part._hf_hook
        assert device_of_run(pipe) == torch.device("cpu")


def test_runs_of_the_editor_find_it_so_and_leave_the_class_as_it_was(pipe: Any, asked: list[str]) -> None:
    driver = Driver(pipe, progress=False)
    settings = driver.settings(seed=1, num_inference_steps=2, guidance_scale=3.0)
    driver.run("a cat", None, settings, KeepLatents(), "base")
    assert asked == [] and type(pipe) is StableDiffusionPipeline

    def broken(*_: Any) -> Any:
        assert type(pipe) is not StableDiffusionPipeline
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        driver.run("a cat", None, settings, broken, "base")
    assert type(pipe) is StableDiffusionPipeline


def test_runs_within_runs_leave_the_class_as_it_was(pipe: Any) -> None:
    first, second = device_looked_up(pipe), device_looked_up(pipe)
    with first:
        quick = type(pipe)
        second.__enter__()
        assert type(pipe) is quick
    second.__exit__(None, None, None)  # in another order than they were entered, as two threads do
    assert type(pipe) is StableDiffusionPipeline


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_copies_in_a_run_are_of_the_pipelines_own_class(pipe: Any, copied: Any) -> None:
    with device_looked_up(pipe):
        other = copied(pipe)
    assert type(other) is StableDiffusionPipeline and other._execution_device == torch.device("cpu")
    assert other.unet.config == pipe.unet.config


class _Other(StableDiffusionPipeline):
    pass


def test_a_class_that_a_pipeline_is_given_in_a_run_stays(pipe: Any) -> None:
    with device_looked_up(pipe):
        pipe.__class__ = _Other
    assert type(pipe) is _Other


class _SaysItsDevice(StableDiffusionPipeline):
    @property
    def device(self) -> torch.device:
        return torch.device("meta")


class _FindsItself(StableDiffusionPipeline):
    @property
    def _execution_device(self) -> torch.device:
        return torch.device("meta")


class _Registers(StableDiffusionPipeline):
    derived: list[type] = []  # noqa: RUF012

    def __init_subclass__(cls) -> None:
        cls.derived.append(cls)


@pytest.mark.parametrize("kind", [_FindsItself, _SaysItsDevice, _Registers])
def test_a_class_that_is_not_diffusers_own_in_this_is_left_alone(pipe: Any, kind: type) -> None:
    pipe.__class__ = kind
    with device_looked_up(pipe):
        assert type(pipe) is kind
    assert not _Registers.derived


def test_what_is_no_pipeline_of_diffusers_is_left_alone() -> None:
    other = SimpleNamespace()
    with device_looked_up(other):
        assert type(other) is SimpleNamespace
