"""Bundles of hoisted values on a GPU: a CUDA graph each, so that a new prompt costs a launch and not a hundred.

SDXL's time projections depend on the prompt as well, so every call of an edit computes some; eagerly that is 2 ms of
Python beside a step of 7 ms.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fisedit_compiler.compiling import one_at_a_time
from fisedit_compiler.kernels.addresses import is_plain
from fisedit_compiler.lowering.errors import lowering_error
from fisedit_compiler.passes.programs.hoist import Bundle
from fisedit_compiler.runtime.execution.bundle_values import BundleValues, FlatLayout, FlatValues, SeparateValues
from fisedit_compiler.runtime.execution.graph_capture import capturing

logger = logging.getLogger(__name__)

KEPT = 16
"""Graphs that are kept: one per bundle and form of its inputs."""


class _BundleGraph:
    """A captured bundle; its values end up side by side in one buffer, so that one copy takes them away."""

    def __init__(self, module: fx.GraphModule, arguments: Sequence[Any], values: Mapping[str, Tensor]) -> None:
        """``values`` are the bundle's values for ``arguments``: they tell the layout."""
        self.module = module
        self.inputs = [value.clone() if isinstance(value, Tensor) else value for value in arguments]
        self.filled: list[Any] = [None] * len(arguments)
        self.where = FlatLayout(values)
        self.flat = self.where.buffer()
        targets = self.where.views(self.flat)
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            module(*self.inputs)  # libraries allocate their workspaces outside the capture
        torch.cuda.current_stream().wait_stream(stream)
        with capturing(self.graph):
            torch._foreach_copy_(targets, list(module(*self.inputs)))

    def run(self, arguments: Sequence[Any]) -> FlatValues:
        for index, (buffer, value) in enumerate(zip(self.inputs, arguments, strict=True)):
            if not isinstance(value, Tensor):
                continue
            # Most inputs of a call are the previous call's. Nobody writes to them, see BundleRunner.run().
            if self.filled[index] is not value:
                buffer.copy_(value)
                self.filled[index] = value
        self.graph.replay()
        return FlatValues(self.where, self.flat.clone())


@dataclass(frozen=True)
class _Wanted:
    """What is to be captured: a bundle's module, arguments of one form, and its values for them."""

    module: fx.GraphModule
    arguments: Sequence[Any]
    values: Mapping[str, Tensor]


class BundleRunner:
    """Evaluates bundles; on a GPU, what is evaluated a second time for inputs of one form is captured.

    Its owner lets one thread at a time in. Capturing is apart from evaluating, since it waits for whoever compiles.
    """

    def __init__(self, graphs: bool) -> None:
        self.graphs = graphs
        self._captured: OrderedDict[tuple[Any, ...], _BundleGraph | None] = OrderedDict()
        self._wanted: dict[tuple[Any, ...], _Wanted] = {}

    def clear(self) -> None:
        """Forget the graphs: they read parameters where they were."""
        self._captured = OrderedDict()
        self._wanted = {}

    @property
    def wants(self) -> bool:
        """Whether something is to be captured."""
        return bool(self._wanted)

    def run(self, bundle: Bundle, module: fx.GraphModule, arguments: Sequence[Any]) -> BundleValues:
        """The bundle's values, each dense and aligned.

        ``arguments`` are tensors that are never written to, so that one that comes again holds what it held. A caller's
        tensor is none: writes through ``.data`` or dlpack are not counted. The values may be views of them.
        """
        # Values of the weights alone are computed once, and are as large as the weights.
        if not self.graphs or not bundle.dependences or not self._capturable(arguments):
            return _dense(bundle, module(*arguments))
        key = (bundle.name, *(_form(value) for value in arguments))
        graph = self._captured.get(key)
        if graph is None:
            values = _dense(bundle, module(*arguments))
            if key in self._captured and values:
                self._wanted[key] = _Wanted(module, arguments, values)
            self._keep(key, None)
            return values
        self._captured.move_to_end(key)
        return graph.run(arguments)

    def capture_wanted(self, lock: AbstractContextManager[Any]) -> None:
        """Capture what was evaluated often enough. Compiles, so nobody calls it inside a lock.

        Args:
            lock: its owner's, which is not held while something is captured.
        """
        with lock:
            wanted = self._wanted
            self._wanted = {}
            known = self._captured
        for key, what in wanted.items():
            graph = self._capture(what)
            with lock:
                # Not if all was forgotten meanwhile: the graph reads what the module had then.
                if graph is not None and known is self._captured and key in known:
                    self._keep(key, graph)

    def _keep(self, key: tuple[Any, ...], graph: _BundleGraph | None) -> None:
        self._captured[key] = graph
        while len(self._captured) > KEPT:
            self._captured.popitem(last=False)

    def _capture(self, wanted: _Wanted) -> _BundleGraph | None:
        try:
            return _capture(wanted.module, wanted.arguments, wanted.values)
        except (torch.cuda.OutOfMemoryError, MemoryError) as error:
            # The values are there already, and are as right without a graph; sparse steps keep theirs.
            logger.warning(
                "Values that depend on the prompt are computed without CUDA graphs from now on: memory ran out (%s).\n"
                "The results are the same; a new prompt takes some milliseconds longer.",
                str(error).splitlines()[0] if str(error) else type(error).__name__,
            )
        self.graphs = False
        self.clear()
        return None

    def _capturable(self, arguments: Sequence[Any]) -> bool:
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        return bool(tensors) and all(value.is_cuda for value in tensors)


@one_at_a_time
def _capture(module: fx.GraphModule, arguments: Sequence[Any], values: Mapping[str, Tensor]) -> _BundleGraph:
    try:
        return _BundleGraph(module, arguments, values)
    except Exception as error:
        raise lowering_error(error, module, arguments, None) from error


def _form(value: Any) -> Any:
    return (value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else value


def _dense(bundle: Bundle, values: Sequence[Tensor]) -> SeparateValues:
    dense = [v if is_plain(v) else v.clone(memory_format=torch.contiguous_format) for v in values]
    return SeparateValues(zip(bundle.values, dense, strict=True))
