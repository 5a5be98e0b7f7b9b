"""Hoisted values at run time: each bundle is computed when its inputs change, and never otherwise."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from fisedit_compiler.passes.hoist import BATCH_SIZE, Bundle

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
        if not isinstance(value, Tensor) or not isinstance(self.value, Tensor):
            return type(self.value) is type(value) and bool(self.value == value)
        if self.value is value:
            return self.version == _version(value)
        same = self.value.shape == value.shape and self.value.dtype == value.dtype and self.value.device == value.device
        # A kept tensor that was written to since no longer tells what the result was computed from.
        return same and self.version == _version(self.value) and torch.equal(self.value, value)


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


@dataclass
class _Entry:
    inputs: dict[str, _Input]
    values: dict[str, Tensor]


class HoistCache:
    """Results of bundles, per bundle the most recently used few.

    Bundles that depend on the timestep are kept for every call of a run, so that later edits of the same recording
    reuse them; the others (text, weights) for the last two prompts.
    """

    def __init__(self, per_call: frozenset[str], calls: int = 1024, prompts: int = 2) -> None:
        self.per_call, self.calls, self.prompts = per_call, calls, prompts
        self.computed: dict[str, int] = {}
        self._entries: dict[str, OrderedDict[int, _Entry]] = {}
        self._next = 0

    def clear(self) -> None:
        """Forget everything (weights, adapters or their scales changed)."""
        self._entries.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of all cached values."""
        return sum(
            tensor.nbytes
            for kept in self._entries.values()
            for entry in kept.values()
            for tensor in entry.values.values()
        )

    def evaluate(
        self,
        bundles: Sequence[tuple[Bundle, fx.GraphModule]],
        tensors: Mapping[str, Tensor],
        batch: int,
        scalars: Mapping[str, float] = MappingProxyType({}),
    ) -> dict[str, Tensor]:
        """All hoisted values for one call's tensors (by placeholder name) and batch.

        ``scalars`` are values of one-element tensors that the caller has read already: comparing them needs no
        second wait for the device.
        """
        known: dict[str, Tensor] = {}
        identities = {**tensors, **scalars, BATCH_SIZE: batch}
        for bundle, module in bundles:
            inputs = {name: identities[name] for name in bundle.dependences}
            entry = self._find(bundle, inputs)
            if entry is None:
                entry = _Entry(
                    {name: _Input.of(value) for name, value in inputs.items()},
                    self._compute(bundle, module, tensors, batch, known),
                )
                self._keep(bundle, entry)
            known.update(entry.values)
        return known

    def _find(self, bundle: Bundle, inputs: Mapping[str, Any]) -> _Entry | None:
        kept = self._entries.get(bundle.name)
        if not kept:
            return None
        # Numbers first: comparing tensors may wait for the device.
        names = sorted(inputs, key=lambda name: isinstance(inputs[name], Tensor))
        for key in reversed(kept):
            entry = kept[key]
            if all(entry.inputs[name].matches(inputs[name]) for name in names):
                kept.move_to_end(key)
                return entry
        return None

    def _keep(self, bundle: Bundle, entry: _Entry) -> None:
        kept = self._entries.setdefault(bundle.name, OrderedDict())
        kept[self._next] = entry
        self._next += 1
        limit = self.calls if bundle.dependences & self.per_call else self.prompts
        while len(kept) > limit:
            kept.popitem(last=False)

    def _compute(
        self, bundle: Bundle, module: fx.GraphModule, tensors: Mapping[str, Tensor], batch: int, known: Values
    ) -> dict[str, Tensor]:
        arguments: list[Any] = []
        for node in bundle.graph.nodes:
            if node.op == "placeholder":
                kind, *rest = node.meta["input"]
                arguments.append(batch if kind == "batch" else (known if kind == "hoisted" else tensors)[rest[0]])
        self.computed[bundle.name] = self.computed.get(bundle.name, 0) + 1
        return dict(zip(bundle.values, module(*arguments), strict=True))
