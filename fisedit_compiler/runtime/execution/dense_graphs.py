"""Dense calls on a GPU: the recording graph as Inductor makes it, one CUDA graph for each set of sizes.

A base run, a call above the break-even and a call that looks for a mask compute the same graph; they differ in what
they keep of it. So one compilation serves them all: the graph writes its results, slots included, to memory of its own,
and a call copies out what it wants. Convolutions read the packed weights of sparse steps, which lie in the order that
they compute in.

Sizes are fixed, since Inductor takes minutes for a dense graph with symbolic ones. A compilation takes a minute, and a
call saves some 20 ms: it pays where a size comes again. So a run says that it begins (:meth:`DenseGraphs.expect`), and
the second one of a size compiles. Until then, and where that fails, calls are interpreted.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fisedit_compiler.compiling import one_at_a_time
from fisedit_compiler.lowering.codegen.inductor import compile_dense
from fisedit_compiler.lowering.dense import DenseForm, dense_form
from fisedit_compiler.runtime.execution.graph_capture import capture_into
from fisedit_compiler.runtime.execution.in_order import InOrder
from fisedit_compiler.runtime.execution.owned_outputs import OwnedOutputs

logger = logging.getLogger(__name__)

RUNS = 2
"""Of a size until it is compiled."""
CLOSE = 3
"""How many times the rounding that was seen when code was compared is rounding still, of other inputs."""
KEPT = 2
"""Sizes whose graphs are kept: each holds a whole recorded call."""

_NOTICE = "Dense calls of %s are interpreted from now on, which is slower and gives the same results: %s"

Sizes = tuple[tuple[torch.Size, torch.dtype], ...]
Packed = Mapping[str, Tensor]
"""Packed weights by the path of the weight; tensors that nobody writes to."""


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    weights: _PackedWeights
    outputs: list[Any]
    owned: OwnedOutputs
    form: DenseForm
    contiguous: set[int] = field(default_factory=set)
    distances: list[float] = field(default_factory=list)


class _PackedWeights:
    """Packed weights where a graph reads them: those that there were when it was captured.

    Others, of weights that were written to, are copied there. They are kept alive by whoever packed them alone.
    """

    def __init__(self, paths: Sequence[str], packed: Packed) -> None:
        self.read = [packed[path] for path in paths]
        self._paths = paths
        self._followed = [weakref.ref(value) for value in self.read]

    def follow(self, packed: Packed) -> None:
        """Let the graph compute with these from now on."""
        for number, path in enumerate(self._paths):
            value = packed[path]
            if self._followed[number]() is not value:
                self.read[number].copy_(value)
                self._followed[number] = weakref.ref(value)


class DenseGraphs:
    """The CUDA graphs of one program's recording graph.

    Attributes:
        refused: why calls are interpreted though they could be compiled; ``None`` while nothing failed.
    """

    def __init__(self, name: str) -> None:
        """``name`` is what warnings call the module."""
        self.name = name
        self.refused: str | None = None
        self._in_order = InOrder()
        self._runs: Counter[Sizes] = Counter()
        self._captured: OrderedDict[Sizes, _Captured] = OrderedDict()

    def expect(self, arguments: Sequence[Tensor]) -> bool:
        """A run of calls with such arguments begins; says whether its calls are to be compiled ones."""
        sizes = _sizes(arguments)
        self._runs[sizes] += 1
        return self.refused is None and (sizes in self._captured or self._runs[sizes] >= RUNS)

    def know(self, arguments: Sequence[Tensor]) -> bool:
        """Whether there is code for calls with such arguments."""
        return _sizes(arguments) in self._captured

    def is_as_close(self, arguments: Sequence[Tensor], own: Sequence[Any], compiled: Sequence[Any]) -> bool:
        """Whether results of compiled code are as close to others as to the interpreted ones when it was compared.

        ``False`` says nothing: bits have to be compared then.
        """
        known = self._captured.get(_sizes(arguments))
        if known is None or len(own) != len(compiled):
            return False
        try:
            found = distances(own, compiled)
        except ValueError:
            return False
        return all(now <= CLOSE * then for now, then in zip(found, known.distances, strict=False))

    def run(
        self,
        recording: Callable[[], fx.GraphModule],
        arguments: Sequence[Tensor],
        wanted: int,
        packed: Callable[[], Packed] = dict,
    ) -> list[Any] | None:
        """The first ``wanted`` results of a call, in tensors of the caller's own; ``None`` if it is to be interpreted.

        The first call of its sizes is interpreted too, and compared: where results differ by more than compilation
        explains, every call is interpreted from then on.

        Args:
            recording: gives the graph, bound to its weights.
            arguments: of the call, in the graph's order.
            wanted: how many results, the model's outputs first.
            packed: gives the packed weights of the moment.
        """
        sizes = _sizes(arguments)
        captured = self._captured.get(sizes) or self._first(sizes, recording, arguments, packed)
        if captured is None:
            return None
        weights = packed()
        with self._in_order.on(device_of(arguments)):
            captured.weights.follow(weights)
            return _replayed(captured, arguments, wanted)

    def drop(self) -> None:
        """Let go of the graphs, as their weights were exchanged; whoever exchanges them every time waits for none."""
        self._captured.clear()
        self._runs.clear()

    @one_at_a_time
    def _first(
        self,
        sizes: Sizes,
        recording: Callable[[], fx.GraphModule],
        arguments: Sequence[Tensor],
        packed: Callable[[], Packed],
    ) -> _Captured | None:
        if self.refused is not None or sizes in self._captured:
            return self._captured.get(sizes)
        try:
            weights = packed()
            with self._in_order.on(device_of(arguments)):
                graph = recording()
                captured = self._capture(graph, arguments, weights)
                interpreted = graph(*arguments)
                results = _replayed(captured, arguments, len(captured.outputs))
                captured.distances.extend(_compare(interpreted, results))
                captured.contiguous.update(_lie_otherwise(interpreted, results))
        except Exception as error:
            self.refused = f"{type(error).__name__}: {error}".splitlines()[0]
            self.drop()
        else:
            self._captured[sizes] = captured
            while len(self._captured) > KEPT:
                self._captured.popitem(last=False)
            return captured
        # Outside of the handler: the error's frames hold what the attempt had allocated.
        logger.warning(_NOTICE, self.name, self.refused)
        return None

    def _capture(self, graph: fx.GraphModule, arguments: Sequence[Tensor], packed: Packed) -> _Captured:
        # Other values than the call's: what a capture took for a constant shows when the two are compared.
        inputs = [torch.zeros_like(value, device=device_of(arguments)) for value in arguments]
        # A copy of its own: Dynamo keeps what it compiled by a graph's code, and of one code only so many sizes.
        form = dense_form(graph, packed)
        compiled = compile_dense(form.graph)
        weights = _PackedWeights(form.packed, packed)
        captured = _Captured(torch.cuda.CUDAGraph(), inputs, weights, [], OwnedOutputs({}), form)
        memory = next((other.graph.pool() for other in self._captured.values()), None)

        def body() -> list[Any]:
            return list(compiled(*inputs, *weights.read))

        captured.outputs.extend(capture_into(captured.graph, body, memory, "dense calls"))
        return captured


def device_of(arguments: Sequence[Tensor]) -> torch.device:
    """Where a call runs: a timestep may lie on the CPU, whichever argument it is."""
    devices = [value.device for value in arguments]
    return next((device for device in devices if device.type != "cpu"), devices[0])


def _sizes(arguments: Sequence[Tensor]) -> Sizes:
    return tuple((value.shape, value.dtype) for value in arguments)


def _replayed(captured: _Captured, arguments: Sequence[Tensor], wanted: int) -> list[Any]:
    for buffer, value in zip(captured.inputs, arguments, strict=True):
        buffer.copy_(value)
    captured.graph.replay()
    results = captured.outputs[:wanted]
    tensors = [value for value in captured.outputs if isinstance(value, Tensor)]
    read = sum(isinstance(value, Tensor) for value in results)
    owned = iter(captured.owned.of(tensors, {}, frozenset(range(read, len(tensors)))))
    finished = captured.form.finish([next(owned) if isinstance(value, Tensor) else value for value in results])
    return [value.contiguous() if position in captured.contiguous else value for position, value in enumerate(finished)]


def _compare(interpreted: Sequence[Any], compiled: Sequence[Any]) -> list[float]:
    """Refuse code that computes something else; returns the :func:`distances`.

    Statistics are kept in float32 of values in half precision, so that the coarsest of the results' types tells how
    exact all of them are.

    Raises:
        ValueError: a result is another one than the interpreted graph's, by more than the order of sums explains.
    """
    types = {value.dtype for value in interpreted if isinstance(value, Tensor) and value.is_floating_point()}
    limit = max((torch.finfo(dtype).eps for dtype in types), default=0.0) ** 0.5
    found = distances(interpreted, compiled)
    for number, (right, value, distance) in enumerate(zip(interpreted, compiled, found, strict=True)):
        if distance <= limit:
            continue
        if not bool(torch.isfinite(_norm(right))):
            # What is not finite says nothing, as the run notes itself. The rest is compared.
            both = right.isfinite() & value.isfinite()
            (distance,) = distances([right.where(both, 0)], [value.where(both, 0)])
            if not distance > limit:
                continue
        raise ValueError(f"result {number} differs by {distance:.2g} of its norm, more than {limit:.2g}")
    return found


def _lie_otherwise(interpreted: Sequence[Any], compiled: Sequence[Any]) -> list[int]:
    """The results that are contiguous in one graph and not in the other, as pictures whose channels come last."""
    pairs = enumerate(zip(interpreted, compiled, strict=True))
    tensors = [(number, right, value) for number, (right, value) in pairs if isinstance(right, Tensor)]
    return [number for number, right, value in tensors if right.is_contiguous() and not value.is_contiguous()]


def distances(interpreted: Sequence[Any], compiled: Sequence[Any]) -> list[float]:
    """How far results are apart, each as a share of its norm; 0 where they are equal, NaN where that says nothing.

    Raises:
        ValueError: two have different shapes or types, or are not equal and no floating-point numbers.
    """
    found = []
    for number, (right, value) in enumerate(zip(interpreted, compiled, strict=True)):
        if not isinstance(right, Tensor):
            found.append(0.0)
            continue
        if value.shape != right.shape or value.dtype != right.dtype:
            raise ValueError(
                f"result {number} is {value.dtype} {list(value.shape)}, not {right.dtype} {list(right.shape)}"
            )
        if not right.is_floating_point():
            if not torch.equal(value, right):
                raise ValueError(f"result {number} differs")
            found.append(0.0)
            continue
        least = torch.finfo(torch.float32).tiny
        found.append(float(_norm(value.float() - right.float()) / _norm(right).clamp_min(least)))
    return found


def _norm(value: Tensor) -> Tensor:
    return torch.linalg.vector_norm(value.float())
