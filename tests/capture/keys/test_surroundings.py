"""The key notices what a forward reads that hangs on no module: globals, imports, the environment, packages."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch, attention_processor, embeddings
from torch import Tensor, nn
from torch.nn import functional as F

from fisedit_compiler import sparsify
from fisedit_compiler.capture.keys.model import ModelState
from fisedit_compiler.capture.keys.structure import REPLACED
from tests.support.zoo import ZOO

SCALE = 2.0
FACTOR: ContextVar[float] = ContextVar("FACTOR", default=2.0)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, sample: Tensor) -> Tensor:
        return self.conv(sample) * SCALE


def state_of(forward: Callable[[Tensor], Tensor]) -> ModelState:
    module = Small()
    module.forward = forward  # type: ignore[method-assign]
    return ModelState(module)


def check_noticed(state: ModelState, patch: pytest.MonkeyPatch, change: Callable[[pytest.MonkeyPatch], Any]) -> None:
    """Assert that a change gives another key, and undoing it the former one."""
    before = state.read()
    assert state.glance() is before
    with patch.context() as undone:
        change(undone)
        assert state.glance().structure != before.structure
    assert state.glance().structure == before.structure


def test_a_global_that_the_forward_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    state = ModelState(Small())
    before = state.read()
    monkeypatch.setattr(sys.modules[__name__], "SCALE", 3.0)
    assert state.glance().structure != before.structure


def test_an_attribute_of_a_module_that_the_forward_names(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, inner = types.ModuleType("settings_of_a_user"), types.ModuleType("settings_of_a_user.inner")
    settings.inner, inner.SCALE, settings.other = inner, 2.0, 1  # type: ignore[attr-defined]
    monkeypatch.setitem(globals(), "settings", settings)
    module = Small()
    module.forward = eval("lambda sample: sample * settings.inner.SCALE", globals())
    state = ModelState(module)
    before = state.read()
    settings.other = 2  # type: ignore[attr-defined]
    assert state.glance() is before, "which the forward does not name"
    inner.SCALE = 3.0  # type: ignore[attr-defined]
    assert state.glance().structure != before.structure


@pytest.mark.parametrize("read", ['os.environ["A_SCALE"]', 'os.environ.get("A_SCALE")', 'os.getenv("A_SCALE")'])
def test_the_environment_that_the_forward_reads(read: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SCALE", "2")
    module = Small()
    module.forward = eval(f"lambda sample: sample * float({read})", {"os": os})
    state = ModelState(module)
    before = state.read()
    monkeypatch.setenv("A_SCALE", "3")
    assert state.glance().structure != before.structure
    monkeypatch.setenv("A_SCALE", "2")
    assert state.glance().structure == before.structure


@pytest.mark.parametrize(
    ("library", "name"),
    [(F, "scaled_dot_product_attention"), (F, "silu"), (torch, "bmm"), (Tensor, "softmax"), (Tensor, "__matmul__")],
)
def test_a_function_of_torch_that_was_replaced(library: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As packages of attention kernels do."""
    state = ModelState(Small())
    before = state.read()
    with monkeypatch.context() as patch:
        patch.setattr(library, name, lambda *args, **kwargs: args[0])
        assert state.glance().structure != before.structure
        assert state.differences(state.known.structure, before.structure) == [REPLACED]
    assert state.glance().structure == before.structure


@pytest.mark.parametrize(
    "source",
    ['globals()["SCALE"]', 'eval("SCALE")', "vars(sys.modules[__name__])['SCALE']", "getattr(settings, 'SCALE')"],
)
def test_what_the_forward_looks_up_by_name(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = types.ModuleType("settings_of_a_user")
    space = {"SCALE": 2.0, "sys": sys, "settings": settings, "__name__": "settings_of_a_user"}
    settings.SCALE = 2.0  # type: ignore[attr-defined]
    state = state_of(eval(f"lambda sample: sample * {source}", space))
    before = state.read()
    space["SCALE"] = settings.SCALE = 3.0  # type: ignore[attr-defined]
    assert state.glance().structure != before.structure


def test_a_global_that_is_only_called_like_an_attribute_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a script's ``mask`` would spoil its recordings because a hook has a ``self.mask``."""
    space = {"scale": 2.0}
    state = state_of(eval("lambda sample, self: sample * self.scale", space))
    before = state.read()
    space["scale"] = 3.0
    assert state.glance() is before


def test_what_this_package_made_is_named_only() -> None:
    """A hook may ask the wrapped module for its mode."""
    compiled = sparsify(Small().eval())
    state = state_of(lambda sample: sample if compiled.training else sample * 2)
    before = state.read()
    compiled.note = 1
    assert state.glance() is before


@pytest.mark.parametrize(
    "source",
    [
        "from settings_of_a_user import SCALE as scale",
        "import settings_of_a_user; scale = settings_of_a_user.SCALE",
        "import importlib; scale = importlib.import_module('settings_of_a_user').SCALE",
    ],
)
def test_what_the_forward_imports_when_it_runs(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = types.ModuleType("settings_of_a_user")
    settings.SCALE = 2.0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, settings.__name__, settings)
    space: dict[str, Any] = {}
    exec(f"def forward(sample):\n    {source}\n    return sample * scale", space)
    check_noticed(state_of(space["forward"]), monkeypatch, lambda patch: patch.setattr(settings, "SCALE", 3.0))


def test_what_the_forward_imports_first_is_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "settings_of_another_user.py").write_text("SCALE = 2.0")
    monkeypatch.syspath_prepend(tmp_path)
    space: dict[str, Any] = {}
    exec("def forward(x):\n    from settings_of_another_user import SCALE\n    return x * SCALE", space)
    state = state_of(space["forward"])
    before = state.read()
    state.module(torch.ones(1))
    assert state.glance() == before


def test_a_context_variable_that_the_forward_asks() -> None:
    state = state_of(lambda sample: sample * FACTOR.get())
    before = state.read()
    token = FACTOR.set(3.0)
    assert state.glance().structure != before.structure
    FACTOR.reset(token)
    assert state.glance().structure == before.structure


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_hooks_of_all_modules(register: str) -> None:
    state = ModelState(Small())
    before = state.read()
    handle = getattr(nn.modules.module, register)(lambda *_: None)
    try:
        assert state.glance().structure != before.structure
    finally:
        handle.remove()
    assert state.glance().structure == before.structure


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        (embeddings, "get_timestep_embedding", lambda *args, **_: args[0]),
        (attention_processor, "XLA_AVAILABLE", not attention_processor.XLA_AVAILABLE),
        (attention_processor.AttnProcessor2_0, "__call__", lambda self, attn, hidden_states, **_: hidden_states),
    ],
)
def test_a_part_of_a_package_that_was_exchanged(
    place: Any, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = ModelState(ZOO["sd15"]().module)
    check_noticed(state, monkeypatch, lambda patch: patch.setattr(place, name, value))


def test_a_switch_of_a_package() -> None:
    """diffusers' choice of attention kernels."""
    attention = attention_dispatch._AttentionBackendRegistry

    class Transformer(nn.Module):
        def forward(self, sample: Tensor) -> Tensor:
            return attention_dispatch.dispatch_attention_fn(sample, sample, sample)

    state = ModelState(Transformer())
    before, kept = state.read(), attention._active_backend
    try:
        attention._active_backend = attention_dispatch.AttentionBackendName.FLEX
        assert state.glance().structure != before.structure
    finally:
        attention._active_backend = kept
    assert state.glance().structure == before.structure


@torch.library.custom_op("fisedit_test_surroundings::scaled", mutates_args=())
def scaled(x: Tensor) -> Tensor:
    return x * 2


@torch.compile(backend="eager")
def compiled(x: Tensor) -> Tensor:
    return x * SCALE


def test_operations_and_compiled_functions_may_note_that_they_were_used(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Small()
    module.part = torch.compile(nn.LeakyReLU(0.1), backend="eager")
    module.forward = lambda sample: module.part(compiled(scaled(sample)))  # type: ignore[method-assign]
    state = ModelState(module)
    before = state.read()
    module(torch.ones(2))
    assert state.glance() == before
    check_noticed(state, monkeypatch, lambda patch: patch.setattr(sys.modules[__name__], "SCALE", 3.0))
    module.part._orig_mod.negative_slope = 0.2
    assert state.glance().structure != before.structure
