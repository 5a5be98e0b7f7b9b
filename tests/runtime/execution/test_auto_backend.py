"""``backend="auto"``: lowered where that works, and where it does not, one warning and the same pictures eagerly."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fisedit_compiler import Recording, SparseModule, SparsifyConfig, sparsify
from fisedit_compiler.errors import LoweringError
from fisedit_compiler.runtime.execution import backend, bundle_graphs, graph_capture
from fisedit_compiler.runtime.execution.backend import ProgramBackend
from fisedit_compiler.runtime.execution.cuda_graphs import GraphPool
from tests.lowering.test_lowering_errors import MASK, SAMPLE, compiled, edit, refusing
from tests.support.graph_stand_in import patch_cuda
from tests.support.zoo import ZOO

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def executable_of(module: SparseModule) -> Any:
    (executable,) = module._programs.executables()
    return executable


# -- what it stands for ------------------------------------------------------------------------------


def test_it_is_the_default_and_means_inductor_on_a_gpu_only() -> None:
    config = SparsifyConfig()
    assert config.backend == "auto"
    assert [config.backend_on(kind) for kind in ("cuda", "cpu", "mps", "xpu")] == [
        "inductor",
        "eager",
        "eager",
        "eager",
    ]


def test_on_a_cpu_it_is_eager_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    module = compiled("auto")
    assert torch.equal(edit(module), edit(compiled("eager")))
    assert not executable_of(module)._pools and not warnings_in(caplog)


def test_it_is_lowered_where_that_works(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    patch_cuda(monkeypatch)
    module = compiled("auto")
    torch.testing.assert_close(edit(module), edit(compiled("eager")))
    assert executable_of(module)._pools["update"]._graphs and not warnings_in(caplog)


# -- what cannot be lowered --------------------------------------------------------------------------


def raising(error: Exception) -> Callable[..., Any]:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise error

    return broken


def compiler_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", refusing(aten.add.Tensor, "kernel 17 is broken"))


def no_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", raising(RuntimeError("kernel 17 is broken")))


def no_stagers(monkeypatch: pytest.MonkeyPatch) -> None:
    from fisedit_compiler.kernels.triton import stage_rings

    monkeypatch.setattr(stage_rings, "RingStager", raising(ImportError("kernel 17 is broken")))


def graph_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "graph", raising(RuntimeError("kernel 17 is broken")))


def memory_that_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    error = torch.cuda.OutOfMemoryError("kernel 17 is broken")
    monkeypatch.setattr(torch, "compile", lambda step, **_: raising(error))


REFUSALS = [compiler_that_fails, no_torch_compile, no_stagers, graph_that_is_refused, memory_that_runs_out]


@pytest.mark.parametrize("refuse", REFUSALS)
def test_what_cannot_be_lowered_runs_eagerly_after_one_warning(
    refuse: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    patch_cuda(monkeypatch)
    expected = edit(compiled("eager"))
    module = compiled("auto")
    refuse(monkeypatch)
    for _ in range(3):
        assert torch.equal(edit(module), expected)
    (warning,) = warnings_in(caplog)
    assert warning.startswith("Sparse calls of Model run eagerly from now on, ")
    assert "kernel 17 is broken" in warning and 'SparsifyConfig(backend="eager")' in warning
    executable = executable_of(module)
    assert not executable._pools, "graphs that nobody replays keep their memory"
    assert not executable.is_lowered({"sample": SAMPLE})


def test_a_bundle_that_is_refused_ends_it_too(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Hoisted values are captured at their second evaluation: what was computed before stays right."""
    patch_cuda(monkeypatch)
    monkeypatch.setattr(bundle_graphs.BundleRunner, "_capturable", lambda self, arguments: True)
    model = ZOO["sd15"]()
    inputs = model.make_inputs(1, 16, 24)
    module = sparsify(model.module, SparsifyConfig(dense_above=1.0))
    eager = sparsify(model.module, SparsifyConfig(dense_above=1.0, backend="eager"))
    monkeypatch.setattr(bundle_graphs, "_BundleGraph", raising(RuntimeError("no graph")))
    mask = torch.zeros(16, 24, dtype=torch.bool)
    mask[4:9, 5:11] = True

    def edits(compiled_module: SparseModule) -> list[Tensor]:
        results = []
        with compiled_module.record() as recording:
            compiled_module(**inputs)
        for seed in range(3):
            text = torch.randn(inputs["encoder_hidden_states"].shape, generator=torch.Generator().manual_seed(seed))
            with compiled_module.edit(recording, mask):
                results.append(compiled_module(**{**inputs, "encoder_hidden_states": text})[0])
        return results

    for found, expected in zip(edits(module), edits(eager), strict=True):
        torch.testing.assert_close(found, expected)
    (warning,) = warnings_in(caplog)
    assert "no graph" in warning and executable_of(module).backend.refused is not None


def test_a_refusal_in_mid_run_leaves_a_complete_recording(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The call is made again, and counts once: an edit that records is as long as its base, and can be edited."""
    patch_cuda(monkeypatch)
    results = []
    for kind in ("eager", "auto"):
        module = compiled(kind)
        with module.record() as recording:
            for size in (1.0, 2.0, 3.0):
                module(sample=SAMPLE * size)
        if kind == "auto":
            monkeypatch.setattr(GraphPool, "_capture_into", raising(RuntimeError("no")))
        with module.edit(recording, MASK, record=True) as session:
            outputs = [module(sample=torch.where(MASK, SAMPLE + 1, SAMPLE) * size) for size in (1.0, 2.0, 3.0)]
        result = session.result
        assert isinstance(result, Recording) and result.complete and result.num_calls == 3
        assert [ran for ran, _ in session.timings] == ["sparse"] * 3
        with module.edit(result, MASK):
            outputs += [module(sample=torch.where(MASK, SAMPLE - 1, SAMPLE) * size) for size in (1.0, 2.0, 3.0)]
        results.append(outputs)
    assert all(torch.equal(found, expected) for found, expected in zip(*results, strict=True))
    assert len(warnings_in(caplog)) == 1


def test_a_later_graph_that_is_refused(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Of another mask, after graphs that worked."""
    patch_cuda(monkeypatch)
    module = compiled("auto")
    expected = edit(module)
    with module.record() as recording:
        module(sample=SAMPLE)
    everything = torch.ones_like(MASK)
    graph_that_is_refused(monkeypatch)
    with module.edit(recording, everything):
        result = module(sample=SAMPLE + 1)
    with torch.no_grad():
        torch.testing.assert_close(result, module.original(SAMPLE + 1))
    torch.testing.assert_close(edit(module), expected)
    assert len(warnings_in(caplog)) == 1


def test_what_also_fails_eagerly_is_that_error(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_cuda(monkeypatch)
    module = compiled("auto")
    compiler_that_fails(monkeypatch)
    executable = executable_of(module)
    broken = raising(ValueError("the device is gone"))
    graph = executable._graph
    monkeypatch.setattr(executable, "_graph", lambda name: graph(name) if name == "recording" else broken())
    with pytest.raises(ValueError, match="the device is gone"):
        edit(module)


def test_finding_the_node_compiles_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """That takes minutes; ``backend="inductor"`` and ``check(lowered=True)`` are for it."""
    patch_cuda(monkeypatch)
    compiles: list[fx.GraphModule] = []

    def fail(step: fx.GraphModule, **options: Any) -> Any:
        compiles.append(step)
        return refusing(aten.add.Tensor, "no")(step, **options)

    monkeypatch.setattr(torch, "compile", fail)
    module = compiled("auto")
    edit(module)
    assert len(compiles) == 1
    other = compiled("auto")
    with other.record():
        other(sample=SAMPLE)
    (difference,) = other.check(MASK, lowered=True).differences
    assert difference.what == "lowering" and difference.operation == "aten.add.Tensor"
    assert executable_of(other).backend.refused is None, "a check changes nothing"


def test_inductor_by_name_still_raises(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    patch_cuda(monkeypatch)
    module = compiled("inductor")
    no_stagers(monkeypatch)
    with pytest.raises(LoweringError, match="kernel 17 is broken"):
        edit(module)
    assert not warnings_in(caplog)


def test_the_stream_is_the_callers_after_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.graph leaves its own current when the capture cannot be ended."""
    current = ["caller's"]

    class Stream(nullcontext[None]):
        def __enter__(self) -> None:
            self.before = current[0]

        def __exit__(self, *_: object) -> None:
            current[0] = self.before

    class Graph(nullcontext[None]):
        def __enter__(self) -> None:
            current[0] = "capture's"

        def __exit__(self, *_: object) -> None:
            raise RuntimeError("cannot end")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: Stream())
    monkeypatch.setattr(graph_capture, "_stream_of", lambda device: "capture's")
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: Graph())
    monkeypatch.setattr(graph_capture, "_refused", [])
    graph: Any = object()
    with pytest.raises(RuntimeError, match="cannot end"), graph_capture.capturing(graph):
        pass
    assert current == ["caller's"] and graph_capture._refused == [graph]


# -- what is known beforehand ------------------------------------------------------------------------


@pytest.fixture
def fresh_obstacles() -> Any:
    backend.obstacle.cache_clear()
    yield
    backend.obstacle.cache_clear()


def test_other_devices_are_named(fresh_obstacles: None, caplog: pytest.LogCaptureFixture) -> None:
    for kind in ("mps", "xpu", "meta"):
        caplog.clear()
        runs = ProgramBackend(SparsifyConfig(), "UNet")
        assert [runs.on(torch.device(kind)) for _ in range(3)] == ["eager"] * 3
        (warning,) = warnings_in(caplog)
        assert f"and this is {kind}" in warning and 'SparsifyConfig(backend="eager")' in warning


def test_old_gpus_and_missing_parts_are_named(
    fresh_obstacles: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    driver = pytest.importorskip("triton.runtime").driver
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla P100")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 0))
    assert ProgramBackend(SparsifyConfig(), "UNet").on(CUDA) == "eager"
    assert "needs compute capability 7.0, and Tesla P100 has 6.0" in warnings_in(caplog)[0]

    backend.obstacle.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(type(driver), "active", property(raising(RuntimeError("Failed to find C compiler."))))
    reason = backend.obstacle(CUDA)
    assert reason is not None and "Failed to find C compiler." in reason and "install gcc, or set CC" in reason

    backend.obstacle.cache_clear()
    monkeypatch.setitem(sys.modules, "triton.runtime", None)
    assert "Triton cannot be imported" in str(backend.obstacle(CUDA))


def test_settings_made_by_name_are_not_examined(fresh_obstacles: None, caplog: pytest.LogCaptureFixture) -> None:
    assert ProgramBackend(SparsifyConfig(backend="eager"), "UNet").on(torch.device("mps")) == "eager"
    assert ProgramBackend(SparsifyConfig(backend="inductor"), "UNet").on(CUDA) == "inductor"
    assert not warnings_in(caplog)


# -- on a GPU ----------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_on_a_gpu_a_unet_as_it_comes_is_replayed(caplog: pytest.LogCaptureFixture) -> None:
    found, expected = on_a_gpu(SparsifyConfig()), on_a_gpu(SparsifyConfig(backend="eager"))
    torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=1e-3)
    assert found[0]._pools and found[0]._pools["update"]._graphs, "the step ran without graphs"
    assert not warnings_in(caplog)


@pytest.mark.gpu
def test_on_a_gpu_a_capture_that_is_refused_leaves_everything_usable(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A synchronisation while capturing makes CUDA refuse the graph."""

    def synchronising(step: fx.GraphModule, **_: Any) -> Any:
        def run(*arguments: Tensor) -> Any:
            if torch.cuda.is_current_stream_capturing():
                torch.cuda.synchronize()
            return step(*arguments)

        return run

    expected = on_a_gpu(SparsifyConfig(backend="eager"))[1]
    stream = torch.cuda.current_stream()
    monkeypatch.setattr(torch, "compile", synchronising)
    executable, found = on_a_gpu(SparsifyConfig())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert len(warnings_in(caplog)) == 1 and executable.backend.refused is not None
    assert torch.cuda.current_stream() == stream
    assert torch.isfinite(torch.randn(8, device="cuda")).all(), "random numbers can be drawn as before"
    graph, value = torch.cuda.CUDAGraph(), torch.zeros(8, device="cuda")
    with torch.cuda.graph(graph):
        value += 1
    graph.replay()
    assert value.sum() == 8, "other graphs can be captured as before"


def on_a_gpu(config: SparsifyConfig) -> tuple[Any, Tensor]:
    """The executable of a small UNet on a GPU, and what an edit of it gives."""
    torch.manual_seed(0)
    model = ZOO["sd15"]()
    module = sparsify(model.module.to("cuda"), config)
    inputs = {
        name: value.to("cuda") if isinstance(value, Tensor) else value
        for name, value in model.make_inputs(2, 16, 24).items()
    }
    mask = torch.zeros(16, 24, dtype=torch.bool)
    mask[4:9, 5:11] = True
    with module.record() as recording:
        module(**inputs)
    with module.edit(recording, mask):
        result: Tensor = module(**inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"] + 1})[0]
    return executable_of(module), result
