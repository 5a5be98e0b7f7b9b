"""Hoisted values at run time: each bundle is computed when its inputs change, and never otherwise."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from fisedit_compiler.kernels.addresses import address_table
from fisedit_compiler.passes.hoist import BATCH_SIZE, Bundle
from fisedit_compiler.runtime.bundle_graphs import BundleRunner

Values = Mapping[str, Tensor]


@dataclass
class _Input:
    """An input a cached result was computed from, kept alive so that identity means equality.

    Inference tensors have no version counter, so a write to one goes unseen: a copy is kept instead, and compared.
    """

    value: Any
    version: int

    @classmethod
    def of(cls, value: Any) -> _Input:
        if isinstance(value, Tensor) and value.is_inference():
            value = value.clone()
        return cls(value, _version(value))

    def matches(self, value: Any) -> bool:
        if self.value is value and isinstance(value, Tensor):
            return self.version == _version(value)
        if not isinstance(value, Tensor) or not isinstance(self.value, Tensor):
            return type(self.value) is type(value) and bool(self.value == value)
        same = self.value.shape == value.shape and self.value.dtype == value.dtype and self.value.device == value.device
        # A kept tensor that was written to since no longer tells what the result was computed from.
        return same and self.version == _version(self.value) and torch.equal(self.value, value)


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


@dataclass(eq=False)
class HoistedGroup:
    """The values of one bundle for one set of inputs.

    Attributes:
        values: by name, in the bundle's order.
        form: a number that groups of equal shapes, strides and dtypes share.
    """

    inputs: Mapping[str, _Input]
    values: dict[str, Tensor]
    form: int

    @cached_property
    def addresses(self) -> Tensor:
        """int64 ``[len(values)]`` on the values' device; only read while the group is alive."""
        tensors = list(self.values.values())
        return address_table(tensors, tensors[0].device)


@dataclass(frozen=True)
class Hoisted(Mapping[str, Tensor]):
    """All hoisted values of a call, by name; ``groups`` are those of the bundles, in their order."""

    groups: tuple[HoistedGroup, ...]

    @cached_property
    def _merged(self) -> dict[str, Tensor]:
        return {name: value for group in self.groups for name, value in group.values.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._merged[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._merged)

    def __len__(self) -> int:
        return len(self._merged)


class HoistCache:
    """Results of bundles, per bundle the most recently used few.

    Bundles that depend on the timestep are kept for every call of a run, so that later edits of the same recording
    reuse them; the others (text, weights) for the last two prompts.
    """

    def __init__(self, per_call: frozenset[str], calls: int = 1024, prompts: int = 2, graphs: bool = False) -> None:
        """``graphs``: evaluate bundles by CUDA graphs where they are on a GPU."""
        self.per_call, self.calls, self.prompts = per_call, calls, prompts
        self.runner = BundleRunner(graphs)
        self.computed: dict[str, int] = {}
        # By bundle and by the numbers among its inputs; of each the most recent last.
        self._kept: dict[str, OrderedDict[tuple[Any, ...], list[HoistedGroup]]] = {}
        self._forms: dict[tuple[Any, ...], int] = {}

    def clear(self) -> None:
        """Forget everything (weights, adapters or their scales changed)."""
        self._kept.clear()
        self.runner.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of all cached values."""
        return sum(
            tensor.nbytes
            for kept in self._kept.values()
            for groups in kept.values()
            for group in groups
            for tensor in group.values.values()
        )

    def evaluate(
        self,
        bundles: Sequence[tuple[Bundle, fx.GraphModule]],
        tensors: Mapping[str, Tensor],
        batch: int,
        scalars: Mapping[str, float] = MappingProxyType({}),
    ) -> Hoisted:
        """All hoisted values for one call's tensors (by placeholder name) and batch.

        ``scalars`` are values of one-element tensors that the caller knows already: comparing them needs no wait for
        the device.
        """
        groups: list[HoistedGroup] = []
        numbers: dict[str, Any] = {**scalars, BATCH_SIZE: batch}
        for bundle, module in bundles:
            # Hashed, not searched: a run of fifty calls asks fifty times, between two launches.
            key = tuple(numbers[name] for name in bundle.ordered if name in numbers)
            named = {name: tensors[name] for name in bundle.ordered if name not in numbers}
            group = self._find(bundle, key, named)
            if group is None:
                group = self._compute(bundle, module, tensors, batch, groups, named)
                self._keep(bundle, key, group)
            groups.append(group)
        return Hoisted(tuple(groups))

    def _find(self, bundle: Bundle, key: tuple[Any, ...], named: Mapping[str, Tensor]) -> HoistedGroup | None:
        kept = self._kept.get(bundle.name)
        groups = None if kept is None else kept.get(key)
        if kept is None or groups is None:
            return None
        for position in range(len(groups) - 1, -1, -1):
            group = groups[position]
            if all(group.inputs[name].matches(value) for name, value in named.items()):
                kept.move_to_end(key)
                groups.append(groups.pop(position))
                return group
        return None

    def _keep(self, bundle: Bundle, key: tuple[Any, ...], group: HoistedGroup) -> None:
        kept = self._kept.setdefault(bundle.name, OrderedDict())
        groups = kept.setdefault(key, [])
        groups.append(group)
        kept.move_to_end(key)
        per_call = bool(bundle.dependences & self.per_call)
        # A timestep that is no number (one per sample) is among the tensors: then a key holds a whole run.
        counted = not per_call or bool(self.per_call & bundle.dependences - group.inputs.keys())
        del groups[: -(self.prompts if counted else self.calls)]
        while len(kept) > (self.calls if per_call else self.prompts):
            kept.popitem(last=False)

    def _compute(
        self,
        bundle: Bundle,
        module: fx.GraphModule,
        tensors: Mapping[str, Tensor],
        batch: int,
        groups: Sequence[HoistedGroup],
        named: Mapping[str, Tensor],
    ) -> HoistedGroup:
        known = Hoisted(tuple(groups))
        arguments: list[Any] = []
        for node in bundle.graph.nodes:
            if node.op == "placeholder":
                kind, *rest = node.meta["input"]
                arguments.append(batch if kind == "batch" else (known if kind == "hoisted" else tensors)[rest[0]])
        self.computed[bundle.name] = self.computed.get(bundle.name, 0) + 1
        values = dict(zip(bundle.values, self.runner.run(bundle, module, arguments), strict=True))
        layout = tuple((value.shape, value.stride(), value.dtype) for value in values.values())
        form = self._forms.setdefault(layout, len(self._forms))
        return HoistedGroup({name: _Input.of(value) for name, value in named.items()}, values, form)
