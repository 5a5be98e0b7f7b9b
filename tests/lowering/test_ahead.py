"""Kernels of a step are compiled while Inductor compiles the step: those that it launches, and nothing else changes."""

from __future__ import annotations

import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fisedit_compiler.kernels.gather_taps import gather_taps
from fisedit_compiler.kernels.providers import Provider, choose
from fisedit_compiler.kernels.registry import define_op, op_of
from fisedit_compiler.kernels.traits import OpTraits, no_products
from fisedit_compiler.lowering.codegen import ahead, direct, inductor
from fisedit_compiler.lowering.codegen.ahead import kernels_ahead
from fisedit_compiler.lowering.codegen.inductor import compile_step, taken_apart
from fisedit_compiler.lowering.codegen.rehearsal import OpsOnGpu, rehearse
from tests.kernels.triton.stand_in import compile_without_gpu, forgotten
from tests.lowering.test_repeated import INVOKE, arguments_of
from tests.support.compiled_zoo import base_run, compiled_model, edit_inputs, make_mask
from tests.support.graph_stand_in import refuse_directly
from tests.support.pass_tools import gather_step, step_call

pytest.importorskip("triton")

SIZE = (8, 24)


class OnGpu(fx.Interpreter):
    """Runs a traced graph on real tensors, and this package's ops as a GPU runs them."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is INVOKE:
            region, _, *operands = args
            return OnGpu(region).run(*operands)
        op = op_of(target)
        if op is None:
            return super().call_function(target, args, kwargs)
        with OpsOnGpu():  # for the ops that it calls in turn
            results = op.implementation("CUDA")(*args, **kwargs)
        # What was not launched was not written.
        for result in results if isinstance(results, tuple) else [results]:
            if result.is_floating_point():
                result.zero_()
        return results


def launched_and_rehearsed(
    call: Any, name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[set[Any], set[str]]:
    """Forms of launches that were made and not rehearsed, or the other way round; names of kernels that were."""
    from fisedit_compiler.kernels.triton.launching import noting

    made: list[Any] = []
    rehearsed: list[Any] = []

    def keep(graph: fx.GraphModule, _: Any) -> Any:
        with noting(rehearsed.append):
            rehearse(graph, "cpu")

        def run(*arguments: Any) -> Any:
            with noting(made.append):
                return OnGpu(graph).run(*arguments)

        return run

    # What is compiled for a GPU, although the tensors are here.
    monkeypatch.setattr(inductor, "choose", lambda providers, _, *operands: choose(providers, "cuda", *operands))
    if way == "directly":
        monkeypatch.setattr(direct, "_compile_traced", lambda *traced: lambda inputs: keep(*traced)(*inputs))
    else:
        boxed = aot_autograd(fw_compiler=lambda *traced: make_boxed_func(keep(*traced)), decompositions=taken_apart())
        monkeypatch.setattr(inductor, "_inductor", boxed)
        monkeypatch.setattr(inductor, "directly", refuse_directly)
    lowered = call.executable.program.lowered(name)
    compiled = compile_step(call.executable._bind(lowered))
    with torch.no_grad():
        compiled(*arguments_of(call, lowered))
    differing = {launch.form for launch in made} ^ {launch.form for launch in rehearsed}
    return differing, {launch.kernel.fn.__name__ for launch in rehearsed}


@pytest.mark.parametrize("way", ["directly", "torch.compile"])
@pytest.mark.parametrize(
    ("kind", "norm", "dtype", "expected"),
    [
        ("block", "recorded", torch.float32, {"_gather_taps_kernel", "_merge_rows_kernel"}),
        (
            "scattered",
            "incremental",
            torch.float16,
            {
                "_gather_taps_kernel",
                "_update_statistics_kernel",
                "_attention_sites_kernel",
                "_cross_attention_kernel",
            },
        ),
    ],
    ids=["floats", "halves"],
)
def test_what_is_rehearsed_is_what_is_launched(
    kind: str, norm: Any, dtype: torch.dtype, expected: set[str], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a step with blocks that repeat, traced for any number of rows."""
    mask = make_mask(kind, SIZE, seed=5)
    compiled, base = compiled_model("sd15", norm, dtype=dtype), base_run("sd15", norm, "cached", 2, SIZE, dtype)
    call = step_call(compiled, base, edit_inputs("sd15", 2, SIZE, mask, dtype), mask, padding=True)
    differing, kernels = launched_and_rehearsed(call, "update", way, monkeypatch)
    assert not differing and kernels == expected


def test_kernels_of_other_packages_never_see_fake_tensors() -> None:
    called: list[Tensor] = []

    def kernel(x: Tensor) -> Tensor:
        called.append(x)
        return x + x

    op = define_op(
        "fisedit_tests_ahead::double(Tensor x) -> Tensor",
        kernel,
        torch.empty_like,
        traits=OpTraits(flops=no_products),
        providers=[Provider("theirs", "CUDA", kernel)],
    )
    with FakeTensorMode():
        traced = make_fx(lambda x: gather_taps(op(x), torch.zeros(2, 2, dtype=torch.int64)))(torch.empty(1, 3, 4))
    assert any(node.target is op.overload for node in traced.graph.nodes)
    rehearse(traced, "cpu")
    assert not called


@pytest.fixture
def operands() -> tuple[Tensor, Tensor]:
    return torch.randn(1, 9, 16), torch.randint(0, 9, (5, 4))


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tensors here count as a GPU's."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(ahead, "_cuda_device", lambda inputs: torch.device("cpu"))
    monkeypatch.setattr(ahead, "rehearse", partial(rehearse, device_type="cpu"))


def compiled_gather(operands: tuple[Tensor, Tensor]) -> None:
    """Compile with Inductor, and compare what runs."""
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        compiled = compile_step(gather_step())
        (found,) = compiled(*operands)
        assert torch.equal(found, gather_taps(operands[0] * 2, operands[1]) + 1)


def test_inductor_compiles_while_kernels_are_compiled(
    operands: tuple[Tensor, Tensor], on_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compilations = compile_without_gpu(monkeypatch, tmp_path)
    with forgotten():
        compiled_gather(operands)
    assert compilations.asked == [("_gather_taps_kernel", False)]


def test_a_folder_is_agreed_on(on_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    with kernels_ahead([]):
        assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "triton" / "0")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    with kernels_ahead([]):
        assert os.environ["TRITON_CACHE_DIR"] == "/elsewhere"


@pytest.mark.parametrize("missing", ["ahead", "launching"])
def test_without_triton_nothing_is_compiled_ahead(
    missing: str,
    operands: tuple[Tensor, Tensor],
    on_gpu: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, f"fisedit_compiler.kernels.triton.{missing}", None)
    with caplog.at_level(logging.INFO, "fisedit_compiler"):
        compiled_gather(operands)
    assert not caplog.records


def test_what_cannot_be_rehearsed_is_compiled_all_the_same(
    operands: tuple[Tensor, Tensor], on_gpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(graph: fx.GraphModule) -> None:
        raise RuntimeError("no rehearsal")

    monkeypatch.setattr(ahead, "rehearse", fail)
    with caplog.at_level(logging.INFO, "fisedit_compiler"):
        compiled_gather(operands)
    assert not caplog.records


def test_on_a_cpu_nothing_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fisedit_compiler.kernels.triton.ahead", None)
    monkeypatch.setattr(ahead, "rehearse", lambda graph: pytest.fail("rehearsed"))
    monkeypatch.setattr(ahead.logger, "debug", lambda *_, **__: pytest.fail("tried"))
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    with kernels_ahead([torch.ones(1), 3]) as hand_over:
        hand_over(gather_step())
    assert "TRITON_CACHE_DIR" not in os.environ
