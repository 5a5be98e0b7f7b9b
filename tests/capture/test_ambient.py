"""Ambient state, a test for each row of docs/ambient.md: a run under it is the module's own under it, or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fisedit_compiler import SparseModule, SparsifyConfig, sparsify
from fisedit_compiler.capture.ambient import Ambient
from fisedit_compiler.errors import ModeError, RecordingError
from fisedit_compiler.runtime.calls.binding import Binder
from tests.support.compiled import box
from tests.support.modes import default_device, default_dtype, deterministic
from tests.support.zoo import ZOO, Inputs

MASK = box(2, 2, 6, 6, 8, 8)
State = Callable[[], AbstractContextManager[Any]]


class Small(nn.Module):
    """A convolution, a norm, a projection of a text, and a tensor made without naming dtype or device."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.project = nn.Linear(4, 8)
        self.out = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, sample: Tensor, text: Tensor) -> Tensor:
        weights = torch.arange(1.0, 5.0) / 3
        scale = self.project((text * weights).to(text.dtype))[:, :, None, None]
        return self.out(torch.nn.functional.silu(self.norm(self.conv(sample)) * scale))


def model() -> Small:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Small().eval()


def compiled(module: nn.Module | None = None, **options: Any) -> SparseModule:
    """Compiled by its first call, in whatever state that is made; shares no program with other tests."""
    options = {"multiple": 1, "dense_above": 1.0, "norm": "incremental", "cache": False, **options}
    return sparsify(module or model(), SparsifyConfig(**options))


@cache
def plain() -> SparseModule:
    return compiled()


def inputs(seed: int = 0) -> Inputs:
    drawn = torch.Generator("cpu").manual_seed(seed)
    sample = torch.randn(2, 4, 8, 8, generator=torch.Generator("cpu").manual_seed(9), device="cpu", dtype=torch.float32)
    return {"sample": sample, "text": torch.randn(2, 4, generator=drawn, device="cpu", dtype=torch.float32)}


FOLLOWED: dict[str, State] = {
    "nothing": nullcontext,
    "autocast bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
    "autocast of another device": lambda: torch.autocast("cuda", torch.float16),
    "autocast off": lambda: torch.autocast("cpu", torch.bfloat16, enabled=False),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device": lambda: default_device("cpu"),
    "device context": lambda: torch.device("cpu"),
    "deterministic": deterministic,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
}


@pytest.mark.parametrize("name", FOLLOWED)
@torch.no_grad()
def test_a_run_in_a_state_is_the_modules_own_in_it(name: str) -> None:
    """Recorded bit for bit; under a full mask the edit is the module's edit, under a part of it so outside."""
    module = compiled()
    with FOLLOWED[name]():
        base, edited = module.original(**inputs()), module.original(**inputs(1))
        with module.record() as recording:
            assert same(module(**inputs()), base)
        with module.edit(recording) as session:
            assert same(module(**inputs(1)), edited)
            assert session.timings[0][0] == "dense"
        for mask in (torch.ones_like(MASK, device="cpu"), MASK):
            for record in (False, True):
                with module.edit(recording, mask, record=record) as session:
                    output = module(**inputs(1))
                assert session.timings[0][0] == "sparse" and output.dtype == base.dtype
                assert torch.equal(output[..., ~mask], base[..., ~mask])
                if bool(mask.all()):
                    tolerance = 2e-2 if "16" in name else 1e-5
                    torch.testing.assert_close(output, edited, atol=tolerance, rtol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["autocast bfloat16", "default dtype float64"])
@torch.no_grad()
def test_a_unet_in_a_state_is_its_own_in_it(name: str) -> None:
    unet = ZOO["sd15"]()
    module = sparsify(unet.module, SparsifyConfig(norm="incremental", dense_above=1.0, cache=False))
    base, mask = unet.make_inputs(2, 8, 8), torch.ones(8, 8, dtype=torch.bool)
    edited = {**unet.edit_inputs(base, mask), "timestep": base["timestep"]}
    with FOLLOWED[name]():
        with module.record() as recording:
            assert same(module(**base)[0], unet.module(**base)[0])
        expected = unet.module(**edited)[0]
        with module.edit(recording, mask) as session:
            output = module(**edited)[0]
        with module.edit(recording, MASK) as session:
            outside = module(**unet.edit_inputs(base, MASK))[0][..., ~MASK]
        assert session.timings[0][0] == "sparse"
        assert torch.equal(outside, unet.module(**base)[0][..., ~MASK])
    tolerance = 6e-2 if "16" in name else 1e-3
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@torch.no_grad()
def test_one_state_after_the_other_changes_neither() -> None:
    """The programs of one module: each state finds its own, also the second time."""
    module = compiled()
    states = ("nothing", "autocast bfloat16", "default dtype float64", "inference_mode", "deterministic") * 2
    recordings = {}
    for name in states:
        with FOLLOWED[name](), module.record() as recordings[name]:
            assert same(module(**inputs()), module.original(**inputs()))
    for name in states:
        with FOLLOWED[name](), module.edit(recordings[name], torch.ones_like(MASK)):
            output = module(**inputs(1))
            expected = module.original(**inputs(1))
            torch.testing.assert_close(output, expected, atol=2e-2, rtol=2e-2)
    assert len(module.programs) == 4, "inference mode shares the program of no mode"


OTHERS = [
    ("nothing", "autocast bfloat16"),
    ("autocast bfloat16", "nothing"),
    ("autocast bfloat16", "autocast float16"),
    ("nothing", "default dtype float64"),
    ("default dtype float64", "nothing"),
]


@pytest.mark.parametrize(("recorded", "edited"), OTHERS)
@torch.no_grad()
def test_an_edit_with_other_dtypes_than_the_recording_is_refused(recorded: str, edited: str) -> None:
    module = plain()
    with FOLLOWED[recorded](), module.record() as recording:
        module(**inputs())
    refused = pytest.raises(RecordingError, match=r"Call 0 is made under .* the recording under .*Edit as the run was")
    with refused, FOLLOWED[edited](), module.edit(recording, MASK):
        module(**inputs(1))
    with FOLLOWED[recorded](), module.edit(recording, MASK):
        module(**inputs(1))


PAIRS = [
    ("nothing", "inference_mode"),
    ("inference_mode", "nothing"),
    ("nothing", "deterministic"),
    ("deterministic", "nothing"),
]


@pytest.mark.parametrize(("recorded", "edited"), PAIRS)
@torch.no_grad()
def test_states_that_change_no_dtype_may_edit_each_others_recordings(recorded: str, edited: str) -> None:
    module = compiled()
    for _ in range(2):
        with FOLLOWED[recorded](), module.record() as recording:
            module(**inputs())
        for record in (False, True):
            with FOLLOWED[edited](), module.edit(recording, torch.ones_like(MASK), record=record):
                torch.testing.assert_close(module(**inputs(1)), module.original(**inputs(1)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", ["meta", "cpu"])
@torch.no_grad()
def test_what_the_compiler_makes_is_where_the_module_is_whatever_the_default_device(device: str) -> None:
    """A forward that names its devices works under any default, so does its edit."""

    class Named(Small):
        def forward(self, sample: Tensor, text: Tensor) -> Tensor:
            scale = self.project(text)[:, :, None, None]
            return self.out(torch.nn.functional.silu(self.norm(self.conv(sample)) * scale))

    with torch.random.fork_rng():
        module = compiled(Named().eval())
    mask, full = MASK, torch.ones_like(MASK)
    with default_device(device):
        base, edited = module.original(**inputs()), module.original(**inputs(1))
        with module.record() as recording:
            assert torch.equal(module(**inputs()), base)
        for record in (False, True):
            with module.edit(recording, mask, record=record) as session:
                output = module(**inputs(1))
            assert torch.equal(output[..., ~mask], base[..., ~mask])
            with module.edit(recording, full, record=record):
                torch.testing.assert_close(module(**inputs(1)), edited, atol=1e-5, rtol=1e-5)
        assert session.result is not None
        with module.edit(session.result, mask, record=True):
            module(**inputs(2))
        with module.edit(recording, torch.stack([mask, full]), copies=2):
            doubled = {name: value.repeat_interleave(2, 0) for name, value in inputs(1).items()}
            module(**doubled)


def test_the_disk_cache_tells_states_apart(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FISEDIT_CACHE_DIR", str(tmp_path))
    for name in ("nothing", "autocast bfloat16", "default dtype float64", "nothing", "autocast bfloat16"):
        module = compiled(cache=True)
        with torch.no_grad(), FOLLOWED[name](), module.record():
            assert same(module(**inputs()), module.original(**inputs()))
    assert module.programs[0].from_cache and len(list(tmp_path.glob("*.capture"))) == 3


# -- refused ---------------------------------------------------------------------------------------------------------


class Passive(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class Counting(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


REFUSED: dict[str, tuple[State, str]] = {
    "FakeTensorMode": (FakeTensorMode, "FakeTensorMode is active"),
    "a dispatch mode": (Passive, "Passive is active"),
    "a function mode": (Counting, "Counting is active"),
    "a function mode and a device": (lambda: _both(Counting(), torch.device("cpu")), "Counting is active"),
    "forward differentiation": (forward_ad.dual_level, "forward-mode differentiation"),
}


@contextmanager
def _both(one: AbstractContextManager[Any], other: AbstractContextManager[Any]) -> Iterator[None]:
    with one, other:
        yield


@pytest.mark.parametrize("name", REFUSED)
def test_modes_that_see_operations_are_refused_before_anything_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, (state, words) = plain(), REFUSED[name]
    with module.record() as recording:
        module(**inputs())
    ran: list[bool] = []
    monkeypatch.setattr(Binder, "bind", lambda *_: ran.append(True))
    try:
        for enter in (module.record, lambda: module.edit(recording, MASK)):
            with state(), pytest.raises(ModeError, match=words), enter():
                raise AssertionError("entered")
            with enter(), state(), pytest.raises(ModeError, match=words):
                module(**inputs(1))
                raise AssertionError("called")
    except RecordingError as error:  # the edit had no calls
        assert "ended after 0 calls" in str(error)
    assert not ran


def vmapped(module: SparseModule) -> Any:
    many = {name: value[None] for name, value in inputs().items()}
    return torch.func.vmap(lambda sample, text: module(sample=sample, text=text))(*many.values())


def gradient(module: SparseModule) -> Any:
    return torch.func.grad(lambda sample: module(**{**inputs(), "sample": sample}).sum())(inputs()["sample"])


def tangent(module: SparseModule) -> Any:
    text = inputs()["text"]
    return torch.func.jvp(lambda text: module(**{**inputs(), "text": text}), (text,), (text,))


@pytest.mark.parametrize("transform", [vmapped, gradient, tangent], ids=lambda transform: transform.__name__)
def test_function_transforms_are_refused(transform: Callable[[SparseModule], Any]) -> None:
    module = plain()
    with module.record() as recording:
        with pytest.raises(ModeError, match=r"inside torch\.func"):
            transform(module)
        assert recording.num_calls == 0
    transform(module)  # outside of both modes it is the module itself


def test_gradients_are_refused_where_they_are_asked_for() -> None:
    module, wanted = plain(), inputs()
    wanted["text"].requires_grad_()
    with module.record() as recording:
        with pytest.raises(ModeError, match=r"requires gradients.*torch\.no_grad"):
            module(**wanted)
        with torch.no_grad():
            module(**wanted)
    assert recording.num_calls == 1
    module(**wanted).sum().backward()
    assert wanted["text"].grad is not None


def test_fake_tensors_are_refused_without_their_mode() -> None:
    fake = FakeTensorMode()
    module, faked = plain(), {name: fake.from_tensor(value) for name, value in inputs().items()}
    with module.record(), pytest.raises(ModeError, match="FakeTensor"):
        module(**faked)


# -- an outer torch.compile ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_outer_torch_compile_runs_modes_outside_of_its_graph() -> None:
    module = compiled()
    outer = torch.compile(lambda **kwargs: module(**kwargs) * 2, backend="eager")
    expected = module.original(**inputs())
    assert torch.equal(outer(**inputs()), expected * 2)
    with module.record() as recording:
        assert torch.equal(outer(**inputs()), expected * 2)
    assert recording.num_calls == 1
    with module.edit(recording, MASK):
        output = outer(**inputs(1)) / 2
    assert torch.equal(output[..., ~MASK], expected[..., ~MASK]) and not torch.equal(output, expected)
    assert torch.equal(outer(**inputs(1)), module.original(**inputs(1)) * 2), "in no mode again"


@torch.no_grad()
def test_an_outer_torch_compile_of_one_graph_is_refused_by_it() -> None:
    module = compiled()
    outer = torch.compile(lambda **kwargs: module(**kwargs) * 2, backend="eager", fullgraph=True)
    assert torch.equal(outer(**inputs()), module.original(**inputs()) * 2)
    with module.record() as recording, pytest.raises(torch._dynamo.exc.Unsupported, match="programs of their own"):
        outer(**inputs())
    assert recording.num_calls == 0


def test_reading_the_state_makes_no_tensor() -> None:
    with Passive():
        assert Ambient.now() == Ambient()
