"""Which kernels compute a step's operations on a device, and why others are passed over; nothing is run.

Providers are asked with ``meta`` tensors of the shapes and dtypes that the step's operands have. An op whose reference
calls other ops (a convolution gathers first) counts with those: the reference is run on ``meta`` tensors, and what it
calls is asked likewise. The step is taken as it is before staging: a CUDA graph's attention finds its canvases by
address (``attention_addressed``), with the same kernels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from fisedit_compiler.geometry.conv_tables import ConvKey
from fisedit_compiler.geometry.site_plan import SitePlan
from fisedit_compiler.graph import ir
from fisedit_compiler.graph.sizes import row_symbol
from fisedit_compiler.graph.specs import ValueSpec
from fisedit_compiler.inspect.costs import Values, evaluate, table_of
from fisedit_compiler.inspect.facts import OperationKernel
from fisedit_compiler.kernels.providers import choose
from fisedit_compiler.kernels.registry import Op, op_of

INDUCTOR = "inductor"
"""What is said to compute an op that Inductor takes apart."""

_Found = tuple[str, str, tuple[tuple[str, str], ...]]
"""An operation, what runs, and the names of what is passed over, with reasons."""


def operation_kernels(
    step: fx.Graph, plan: SitePlan | None, values: Values, device_type: str, *, lowered: bool = False
) -> tuple[OperationKernel, ...]:
    """What computes the operations of a step that were defined with a reference, in order of their first call.

    Args:
        step: a step graph.
        plan: gives tables their shapes; without one every site is active, in blocks of one.
        values: numbers for the symbols of the step's shapes.
        device_type: ``torch.device.type`` of where calls run.
        lowered: whether Inductor compiles the step.
    """
    operands = _Operands(plan, values)
    counted: Counter[_Found] = Counter()
    known: dict[str, list[_Found]] = {}
    for node in step.nodes:
        op = op_of(node.target) if node.op == "call_function" else None
        if op is None:
            continue
        given = fx.map_arg((node.args, node.kwargs), operands)
        identity = f"{op.overload} {given}"
        if identity not in known:
            args, kwargs = fx.node.map_aggregate(given, _as_meta)
            known[identity] = list(_found(op, args, kwargs, device_type, lowered))
        counted.update(known[identity])
    return tuple(OperationKernel(name, calls, runs, dict(over)) for (name, runs, over), calls in counted.items())


def _found(op: Op, args: Sequence[Any], kwargs: Mapping[str, Any], device_type: str, lowered: bool) -> Iterator[_Found]:
    choice = choose(op.providers, device_type, args, kwargs)
    taken_apart = lowered and op.traits.inline is not None and choice.provider is None
    runs = INDUCTOR if taken_apart else choice.name
    yield ir.target_name(op.overload), runs, () if taken_apart else tuple(choice.passed_over.items())
    if taken_apart or choice.provider is None:
        with _Calls(device_type, lowered) as calls:
            op.reference(*args, **kwargs)
        yield from calls.found


class _Calls(TorchDispatchMode):
    """Takes the calls of ops that were defined with a reference, and runs only their fakes."""

    def __init__(self, device_type: str, lowered: bool) -> None:
        super().__init__()
        self.device_type, self.lowered = device_type, lowered
        self.found: list[_Found] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        op = op_of(func)
        if op is None:
            return func(*args, **(kwargs or {}))
        self.found.extend(_found(op, args, kwargs or {}, self.device_type, self.lowered))
        return op.fake(*args, **(kwargs or {}))


@dataclass(frozen=True)
class _Operand:
    shape: tuple[int, ...]
    dtype: torch.dtype


class _Operands:
    """Shapes in numbers of what nodes stand for; sizes as they are."""

    def __init__(self, plan: SitePlan | None, values: Values) -> None:
        self.plan, self.values = plan, values
        self.of_spec = lru_cache(maxsize=None)(self._of_spec)

    def __call__(self, node: fx.Node) -> Any:
        if "expr" in node.meta:
            return evaluate(node.meta["expr"], self.values)
        table = table_of(node)
        if table is not None:
            return _Operand(self._table_shape(table.table, table.key), node.meta["spec"].dtype)
        spec = node.meta.get("spec")
        return self.of_spec(spec) if isinstance(spec, ValueSpec) else spec

    def _of_spec(self, spec: ValueSpec) -> _Operand:
        return _Operand(tuple(evaluate(size, self.values) for size in spec.shape), spec.dtype)

    def _table_shape(self, kind: str, key: Any) -> tuple[int, ...]:
        if self.plan is not None:
            table: torch.Tensor = getattr(self.plan, kind)[key]
            return tuple(table.shape)
        if isinstance(key, ConvKey):
            taps = (self.values[row_symbol(key.target)], key.kernel[0] * key.kernel[1])
            return taps if kind == "taps" else (0,)  # where all sites are active no ring is read
        return (self.values[row_symbol(key)],)


def _as_meta(value: Any) -> Any:
    return torch.empty(value.shape, dtype=value.dtype, device="meta") if isinstance(value, _Operand) else value
