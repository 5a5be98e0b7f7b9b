"""A stand-in for CUDA graphs on the CPU: what was "captured" is run again, on the tensors it was captured with.

A step that is compiled is run again whole; of what runs eagerly, :func:`record_operations` notes every operation. It
reads recordings through the table of addresses, as the real kernels do: it shows whether everything a replay reads
was brought to the captured tensors. That kernels and compilation are right, only a GPU shows. No test lives here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar
from weakref import WeakSet

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fisedit_compiler.kernels.addresses import Runs, is_plain, tensor_at
from fisedit_compiler.lowering.codegen import inductor
from fisedit_compiler.lowering.codegen.direct import NotDirect
from fisedit_compiler.pipelines.running import encoder_graphs
from fisedit_compiler.pipelines.running.encoder_graphs import EncoderGraphs
from fisedit_compiler.runtime.execution.executable import Executable


class FakeGraph:
    """Stands for ``torch.cuda.CUDAGraph``: what was "captured" is run again."""

    capturing: FakeGraph | None = None
    alive: ClassVar[WeakSet[FakeGraph]] = WeakSet()

    def __init__(self) -> None:
        FakeGraph.alive.add(self)
        self.captured: list[Callable[[], None]] = []
        self.memory = object()

    def pool(self) -> object:
        return self.memory

    def replay(self) -> None:
        for run in self.captured:
            run()


def captured(run: Callable[[], None]) -> None:
    """Run now, or only at the replays of the graph that is being captured."""
    if FakeGraph.capturing is None:
        run()
    else:
        FakeGraph.capturing.captured.append(run)


class FakeRingStager:
    """Stands for ``RingStager``: reads through the table of addresses too."""

    def __init__(
        self, targets: Sequence[Tensor], entries: Sequence[int], rings: Sequence[Tensor], sites: Sequence[int]
    ) -> None:
        self.jobs = list(zip(targets, entries, rings, sites, strict=True))

    def run(self, addresses: Tensor) -> None:
        captured(lambda: self.copy(addresses))

    def copy(self, addresses: Tensor) -> None:
        for target, entry, ring, count in self.jobs:
            like = target.new_empty(target.shape[0], count, target.shape[2])
            target.copy_(tensor_at(int(addresses[entry]), like).index_select(1, ring))


class FakeCopyStager:
    """Stands for ``CopyStager``, likewise."""

    def __init__(self, targets: Sequence[Tensor], entries: Sequence[int]) -> None:
        self.jobs = list(zip(targets, entries, strict=True))

    def run(self, addresses: Tensor) -> None:
        captured(lambda: self.copy(addresses))

    def copy(self, addresses: Tensor) -> None:
        for target, entry in self.jobs:
            target.copy_(tensor_at(int(addresses[entry]), target))


class FakeCopyOut:
    """Stands for ``CopyOut``: it is not captured, and copies when it is told to."""

    def __init__(self, views: Sequence[Tensor], runs: Sequence[Runs], places: Sequence[tuple[int, int]]) -> None:
        self.jobs = list(zip(views, runs, places, strict=True))

    def run(self, targets: Sequence[Tensor]) -> None:
        for view, runs, (number, first) in self.jobs:
            memory = targets[number].untyped_storage()
            target = torch.empty(0, dtype=view.dtype).set_(
                memory, first // view.element_size(), view.shape, runs.strides
            )
            assert is_plain(target)
            target.copy_(view)


class FakeStream:
    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass


def fake_compile(step: Callable[..., Any], **_: Any) -> Callable[..., Any]:
    """Stands for ``torch.compile``: run eagerly, and let a graph being captured remember how to run again."""

    def run(*arguments: Tensor) -> list[Tensor]:
        if FakeGraph.capturing is None:
            return list(step(*arguments))
        # Capturing computes nothing; the shapes of the outputs are known from running once.
        outputs = [torch.full_like(output, float("nan")) for output in step(*arguments)]

        def replay() -> None:
            for output, value in zip(outputs, step(*arguments), strict=True):
                output.copy_(value)

        captured(replay)
        return outputs

    return run


def refuse_directly(graph: Any, besides: Any = None) -> Callable[..., Any]:
    """Stands for what compiles without ``torch.compile``, so that ``compile`` gets every graph."""

    def refuse(*arguments: Any) -> Any:
        raise NotDirect("a test takes torch.compile's place")

    return refuse


real_compile = torch.compile


def traced_compile(step: nn.Module, **_: Any) -> Callable[..., Any]:
    """As :func:`fake_compile`, but Dynamo traces the step, with its symbolic sizes and its guards."""
    return fake_compile(real_compile(step, fullgraph=True, backend="eager"))


@contextmanager
def fake_capture(graph: FakeGraph, pool: object = None, **_: Any) -> Iterator[None]:
    """Stands for ``torch.cuda.graph``: as there, a pool of memory is gone with the last graph in it."""
    if pool is not None:
        assert any(other.memory is pool for other in FakeGraph.alive), "the pool of memory is gone"
        graph.memory = pool
    FakeGraph.capturing = graph
    try:
        yield
    finally:
        FakeGraph.capturing = None


class _Operations(TorchDispatchMode):
    """Notes operations with the memory that they read and write, and refuses what CUDA refuses in a capture.

    Attributes:
        results: what is allocated while capturing, which holds nothing until the first replay.
    """

    def __init__(self, graph: FakeGraph) -> None:
        super().__init__()
        self.graph = graph
        self.results: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.data_dependent_output in func.tags:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        # The memory, not the tensors: one whose ``.data`` is exchanged is read where it was, as by a graph.
        args, kwargs, there = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}, result))
        given = {_memory(value) for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        written = [value for value in pytree.tree_leaves(there) if _is_new(value, given)]
        self.results += written

        def again() -> None:
            found = pytree.tree_leaves(func(*args, **kwargs))
            for target, value in zip(written, (value for value in found if _is_new(value, given)), strict=True):
                target.copy_(value)

        self.graph.captured.append(again)
        return result


def _memory(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _is_new(value: Any, given: set[int]) -> bool:
    return isinstance(value, Tensor) and _memory(value) not in given


@contextmanager
def record_operations(graph: FakeGraph, pool: object = None, stream: object = None) -> Iterator[None]:
    """Stands for ``capturing`` around what runs eagerly."""
    if pool is not None:
        assert any(other.memory is pool for other in FakeGraph.alive), "the pool of memory is gone"
        graph.memory = pool
    operations = _Operations(graph)
    FakeGraph.capturing = graph
    try:
        with operations:
            yield
    finally:
        FakeGraph.capturing = None
    for value in operations.results:
        value.fill_(float("nan") if value.is_floating_point() else 0)


def patch_encoder_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let text encoders be captured on the CPU."""
    monkeypatch.setattr(EncoderGraphs, "_capturable", lambda graphs, tensors: True)
    monkeypatch.setattr(encoder_graphs, "capturing", record_operations)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: FakeGraph.capturing is not None)
    _patch_streams(monkeypatch)


def _patch_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)


def patch_cuda(monkeypatch: pytest.MonkeyPatch, compile: Callable[..., Any] = fake_compile) -> None:
    """Let the pool run on the CPU, with ``compile`` in ``torch.compile``'s place."""
    stage_rings = pytest.importorskip("fisedit_compiler.kernels.triton.stage_rings")
    stage_copies = pytest.importorskip("fisedit_compiler.kernels.triton.stage_copies")
    copy_out = pytest.importorskip("fisedit_compiler.kernels.triton.copy_out")
    monkeypatch.setattr(stage_rings, "RingStager", FakeRingStager)
    monkeypatch.setattr(stage_copies, "CopyStager", FakeCopyStager)
    monkeypatch.setattr(copy_out, "CopyOut", FakeCopyOut)
    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(inductor, "directly", refuse_directly)
    monkeypatch.setattr(torch.cuda, "graph", fake_capture)
    _patch_streams(monkeypatch)
    monkeypatch.setattr(Executable, "is_lowered", _would_use_cuda_graphs)


def _would_use_cuda_graphs(executable: Executable, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the executable would, were the CPU a GPU on which everything needed is there."""
    return executable.backend.refused is None and executable.config.backend != "eager"


@dataclass
class Compiler:
    """Stands for ``torch.compile``, and counts the dense graphs that it is given."""

    change: Callable[[list[Any]], list[Any]] = lambda results: results
    dense: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, step: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        if options.get("dynamic") is not False:
            return fake_compile(step)
        self.dense.append(options)
        return fake_compile(lambda *arguments: self.change(list(step(*arguments))))
