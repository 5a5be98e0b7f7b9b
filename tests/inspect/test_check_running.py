"""``compiled.check(mask)`` of what runs: the edit that records itself, and the step as it is lowered.

Lowering is a stand-in here (``tests/support/graph_stand_in.py``), wrong where a test makes it so; on a GPU it is
the real one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fisedit_compiler import SparseModule, SparsifyConfig, sparsify
from fisedit_compiler.errors import ConfigError
from fisedit_compiler.inspect import check
from fisedit_compiler.inspect.lowered import NOT_COMPILATION
from fisedit_compiler.recordings.turns import after_sparse_call
from fisedit_compiler.runtime.execution.cuda_graphs import GraphPool
from fisedit_compiler.runtime.execution.executable import Executable
from tests.support.compiled_zoo import compiled_model, make_mask
from tests.support.graph_stand_in import fake_compile, patch_cuda
from tests.support.zoo import ZOO

aten = torch.ops.aten
SIZE = (8, 12)
MASK = make_mask("block", SIZE, seed=3)


class Net(nn.Module):
    """Two convolutions, with activations."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        return self.last(torch.sigmoid(nn.functional.silu(self.first(sample)) + 1.0))


def lowered_net() -> SparseModule:
    torch.manual_seed(0)
    config = SparsifyConfig(backend="inductor", cache=False)
    return sparsify(Net().eval(), config, example_inputs={"sample": torch.zeros(2, 4, *SIZE)})


# -- an edit that records itself -------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["recorded", "incremental"])
def test_a_wrong_slot_after_the_edit_is_found(norm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compiled_model("sd21", norm)
    assert compiled.check(MASK)
    original = Executable.step
    name = "down_blocks.0.resnets.0.conv1.input"

    def step(self: Executable, *args: Any, update: bool, **kwargs: Any) -> Any:
        outputs, stored = original(self, *args, update=update, **kwargs)
        if update:
            stored[name] = stored[name].flip(1)
        return outputs, stored

    monkeypatch.setattr(Executable, "step", step)
    (difference,) = compiled.check(MASK).differences
    assert difference.what == f"slot {name} after the edit"
    assert (difference.operation, difference.path) == ("aten.conv2d", "down_blocks.0.resnets.0.conv1")


def test_a_slot_that_an_edit_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compiled_model("plain_conv")

    def losing(*args: Any) -> dict[str, Any]:
        return {name: value for name, value in after_sparse_call(*args).items() if name != "middle.input"}

    monkeypatch.setattr(check, "after_sparse_call", losing)
    (difference,) = compiled.check(MASK).differences
    assert difference.path == "middle" and "it is missing" in difference.problem


# -- the lowered step ------------------------------------------------------------------------------------


def miscompiled(target: Any, other: Any) -> Callable[..., Any]:
    """A torch.compile that takes an operation for another one."""

    def compile_wrongly(step: fx.GraphModule, **options: Any) -> Any:
        for node in step.graph.nodes:
            if node.target is target:
                node.target = other
        step.recompile()
        return fake_compile(step, **options)

    return compile_wrongly


def test_a_rightly_lowered_step(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_cuda(monkeypatch)
    compiled = lowered_net()
    report = compiled.check(MASK, lowered=True)
    assert report, str(report)
    assert report.compared > compiled.check(MASK).compared, "outputs of the lowered step, and slots after the edit"


@pytest.mark.parametrize("target", [aten.silu.default, aten.sigmoid.default])
def test_a_node_that_is_compiled_wrongly(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    patch_cuda(monkeypatch)
    monkeypatch.setattr(torch, "compile", miscompiled(target, aten.relu.default))
    compiled = lowered_net()
    assert compiled.check(MASK), "interpreted, the step is right"
    report = compiled.check(MASK, lowered=True)
    first, output = report.differences
    assert first.operation == str(target).removesuffix(".default")
    assert first.what.endswith("of the lowered step") and first.error > first.allowed
    assert first.source.startswith("test_check_running.py:")
    assert output.what == "lowered step, output 0"


def test_a_replay_that_is_wrong_though_every_node_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_cuda(monkeypatch)
    original = GraphPool.run
    monkeypatch.setattr(GraphPool, "run", lambda self, *args: [value + 1 for value in original(self, *args)])
    (difference,) = lowered_net().check(MASK, lowered=True).differences
    assert difference.what == f"lowered step ({NOT_COMPILATION}), output 0"


def test_a_step_that_cannot_be_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(step: fx.GraphModule, **_: Any) -> Any:
        def run(*arguments: Any) -> Any:
            raise RuntimeError("no code")

        return run if any(node.target is aten.silu.default for node in step.graph.nodes) else fake_compile(step)

    patch_cuda(monkeypatch)
    monkeypatch.setattr(torch, "compile", refuse)
    (difference,) = lowered_net().check(MASK, lowered=True).differences
    assert (difference.operation, difference.what) == ("aten.silu", "lowering")
    assert "RuntimeError: no code" in difference.problem


def test_where_nothing_is_lowered() -> None:
    compiled = compiled_model("plain_conv")
    with pytest.raises(ConfigError, match=r'this module runs it eagerly here\. .*backend="inductor"'):
        compiled.check(MASK, lowered=True)


def test_passes_have_no_part_in_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_cuda(monkeypatch)
    with pytest.raises(ConfigError, match=r"use check\(mask, lowered=True\)"):
        lowered_net().bisect(MASK, lowered=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_unet_on_a_gpu(dtype: torch.dtype) -> None:
    """Pinned, interpreted, lowered and recording: all of them agree."""
    module = ZOO["sd21"]().module.to("cuda", dtype)
    compiled = sparsify(module, SparsifyConfig(backend="inductor", dense_above=1.0))
    report = compiled.check(make_mask("block", (16, 24), seed=3), lowered=True)
    assert report, str(report)
    (executable,) = compiled._programs.executables()
    assert executable._pools and executable._pools["update"]._graphs, "nothing was lowered"
