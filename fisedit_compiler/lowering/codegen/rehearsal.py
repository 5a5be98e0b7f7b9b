"""Calling this package's ops of a traced graph as a GPU will call them, on fake tensors.

The implementation that the dispatcher would choose runs, and so do the ops that it calls in turn, up to where kernels
are launched (``kernels/triton/launching.py``). Sizes are those of the call that is compiled for; layouts are the traced
ones, from which Inductor may depart for operands whose layout no op cares about. Other packages' kernels would take
fake tensors for real ones, so their ops are left alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fisedit_compiler.kernels.registry import NAMESPACE, Op, op_of

logger = logging.getLogger(__name__)


def rehearse(graph: fx.GraphModule, device_type: str = "cuda") -> None:
    """Make the calls of a traced graph, and of graphs that it calls, whose operands lie on a GPU; each form once.

    Args:
        graph: its nodes have what was traced in ``meta["val"]``.
        device_type: where operands lie (tests: elsewhere).
    """
    done: set[str] = set()
    with torch.no_grad(), FakeTensorMode():
        for op, *traced in _calls(graph, device_type):
            try:
                args, kwargs = pytree.tree_map_only((Tensor, torch.SymInt), _with_sizes, traced)
                form = f"{op.name} {pytree.tree_map_only(Tensor, _described, (args, kwargs))}"
                if form not in done:
                    done.add(form)
                    with OpsOnGpu():
                        _implementation(op)(*args, **kwargs)
            except Exception:  # sizes that only the data tell, for example
                logger.debug("a call of %s cannot be rehearsed", op.name, exc_info=True)


class OpsOnGpu(TorchDispatchMode):
    """Runs implementations of this package's ops in place of their shape functions."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        op = _own(func)
        if op is None:
            return func(*args, **(kwargs or {}))
        with self:
            return _implementation(op)(*args, **(kwargs or {}))


def _own(target: Any) -> Op | None:
    op = op_of(target)
    return op if op is not None and target.namespace == NAMESPACE else None


def _implementation(op: Op) -> Any:
    return op.implementation("CUDA")


def _calls(graph: fx.GraphModule, device_type: str) -> Iterator[tuple[Op, Any, Any]]:
    """Calls of this package's ops with what was traced of their operands."""
    for module in graph.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        for node in module.graph.nodes:
            op = _own(node.target)
            if op is None:
                continue
            operands = pytree.tree_map_only(fx.Node, lambda value: value.meta.get("val"), (node.args, node.kwargs))
            if any(_lies_on(device_type, value) for value in pytree.tree_leaves(operands)):
                yield op, *operands


def _lies_on(device_type: str, value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == device_type


def _size(value: torch.SymInt | int) -> int:
    """What a size is in the call that is compiled for; asking for it makes no promise about other calls."""
    if isinstance(value, int):
        return value
    hint = value.node.hint
    if hint is None:
        raise ValueError(f"nobody knows {value}")
    return int(hint)


def _with_sizes(traced: Any) -> Any:
    """The same with numbers for sizes: a number, or a fake tensor."""
    if not isinstance(traced, Tensor):
        return _size(traced)
    shape, strides = [*map(_size, traced.shape)], [*map(_size, traced.stride())]
    offset = _size(traced.storage_offset())
    if not offset:
        return torch.empty_strided(shape, strides, dtype=traced.dtype, device=traced.device)
    length = offset + 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True) if size)
    memory = torch.empty(length, dtype=traced.dtype, device=traced.device)
    return memory.as_strided(shape, strides, offset)


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tensor.device} {tuple(tensor.shape)} {tensor.stride()} {tensor.storage_offset()}"
