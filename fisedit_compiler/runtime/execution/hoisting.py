"""Hoisted values at run time: each bundle is computed when its inputs change, and never otherwise.

Runs share them: what one edit computed for a timestep, another one finds. One thread at a time looks and computes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from fisedit_compiler.graph.inputs import CallInput, Sources, resolve
from fisedit_compiler.passes.programs.hoist import BATCH_SIZE, Bundle
from fisedit_compiler.runtime.execution.bundle_graphs import BundleRunner
from fisedit_compiler.runtime.execution.bundle_values import BundleValues
from fisedit_compiler.tensors.contents import ContentNumbers, Contents, Later
from fisedit_compiler.tensors.streams import current_stream

PROMPTS = 2
"""Prompts of one run, whose guidance may come in two calls."""


@dataclass(eq=False)
class HoistedGroup:
    """The values of one bundle for one set of inputs.

    Attributes:
        contents: numbers of the contents of the inputs that are compared, in the bundle's order.
        values: by name.
        form: a number that groups of equal shapes, strides and dtypes share.
        stream: the CUDA stream that they were computed on, and whose memory they have.
    """

    contents: tuple[Contents, ...]
    values: BundleValues
    form: int
    stream: torch.cuda.Stream | None = None


@dataclass(frozen=True)
class Hoisted(Mapping[str, Tensor]):
    """All hoisted values of a call, by name; ``groups`` are those of the bundles, in their order."""

    groups: tuple[HoistedGroup, ...]

    def __getitem__(self, name: str) -> Tensor:
        # Not merged into one dictionary: that would look at every value of every group at every call.
        for group in self.groups:
            if name in group.values:
                return group.values[name]
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (name for group in self.groups for name in group.values)

    def __len__(self) -> int:
        return sum(len(group.values) for group in self.groups)


class HoistCache:
    """Results of bundles, per bundle the most recently used few.

    Bundles that depend on the timestep are kept for every call of a run, so that later edits of the same recording
    reuse them; the others (text, weights) for the last two prompts, or as many as runs go on at once.

    Attributes:
        generation: how often everything was forgotten.
    """

    def __init__(
        self, per_call: frozenset[str], calls: int = 1024, prompts: int = PROMPTS, graphs: bool = False
    ) -> None:
        """``graphs``: evaluate bundles by CUDA graphs where they are on a GPU."""
        self.per_call, self.calls, self.prompts = per_call, calls, prompts
        self.runner = BundleRunner(graphs)
        self.numbers = ContentNumbers()
        self.computed: dict[str, int] = {}
        self.generation = 0
        self._lock = threading.RLock()
        # By bundle and by the values known on the host; of each the most recent last.
        self._kept: dict[str, OrderedDict[tuple[Any, ...], list[HoistedGroup]]] = {}
        self._forms: dict[tuple[Any, ...], int] = {}

    def clear(self) -> None:
        """Forget everything (weights, adapters or their scales changed)."""
        with self._lock:
            self.generation += 1
            self._kept.clear()
            self.numbers.clear()
            self.runner.clear()

    def run_eagerly(self) -> None:
        """Evaluate without CUDA graphs from now on; what was evaluated stays."""
        with self._lock:
            if self.runner.graphs:
                self.runner = BundleRunner(graphs=False)

    def serve(self, runs: int) -> None:
        """Keep the values of as many prompts as there are runs at once: they must not drive out each other's."""
        with self._lock:
            self.prompts = max(self.prompts, PROMPTS * runs)

    def fork(self) -> HoistCache:
        """A cache that knows what this one knows, and whose use changes nothing here."""
        with self._lock:
            other = copy(self)
            other._lock = threading.RLock()
            other.runner, other.numbers = BundleRunner(graphs=False), self.numbers.fork()
            other.computed, other._forms = dict(self.computed), dict(self._forms)
            other._kept = {
                name: OrderedDict((key, list(groups)) for key, groups in kept.items())
                for name, kept in self._kept.items()
            }
        return other

    @property
    def nbytes(self) -> int:
        """Bytes of all cached values."""
        with self._lock:
            groups = [group for kept in self._kept.values() for groups in kept.values() for group in groups]
        return sum(group.values.nbytes for group in groups)

    def evaluate(
        self,
        bundles: Sequence[tuple[Bundle, fx.GraphModule]],
        tensors: Mapping[str, Tensor],
        batch: int,
        scalars: Mapping[str, float] = MappingProxyType({}),
        later: Later | None = None,
        generation: int | None = None,
    ) -> Hoisted:
        """All hoisted values for one call's tensors (by placeholder name) and batch.

        ``scalars`` are values of one-element tensors that the caller knows already: comparing them needs no wait for
        the device. ``later`` takes the comparisons of tensors that a CUDA device need not be waited for; without it
        all are compared at once. ``generation`` is the one that ``bundles`` are of: if everything was forgotten since,
        they are computed for this call only.
        """
        with self._lock:
            return self._evaluate(bundles, tensors, batch, scalars, later, generation in (None, self.generation))

    def capture_wanted(self) -> None:
        """Capture what was found worth a CUDA graph. Compiles, so nobody calls it inside a lock."""
        if self.runner.wants:
            self.runner.capture_wanted(self._lock)

    def _evaluate(
        self,
        bundles: Sequence[tuple[Bundle, fx.GraphModule]],
        tensors: Mapping[str, Tensor],
        batch: int,
        scalars: Mapping[str, float],
        later: Later | None,
        keep: bool,
    ) -> Hoisted:
        groups: list[HoistedGroup] = []
        known: dict[str, Any] = {**scalars, BATCH_SIZE: batch}
        contents: dict[str, Contents] = {}
        for bundle, module in bundles:
            # Hashed, not searched: a run of fifty calls asks fifty times, between two launches.
            key = tuple(known[name] for name in bundle.ordered if name in known)
            for name in bundle.ordered:
                if name not in known and name not in contents:
                    kept = self.calls if name in self.per_call else self.prompts
                    contents[name] = self.numbers.of(name, tensors[name], kept, later)
            named = tuple(contents[name] for name in bundle.ordered if name in contents)
            group = self._find(bundle, key, named)
            if group is None:
                owned = self._owned(bundle, tensors, contents, scalars)
                group = self._compute(bundle, module, owned, batch, groups, named)
                if keep:
                    self._keep(bundle, key, group)
            groups.append(group)
        _keep_for_this_stream(groups)
        return Hoisted(tuple(groups))

    def _owned(
        self,
        bundle: Bundle,
        tensors: Mapping[str, Tensor],
        contents: Mapping[str, Contents],
        scalars: Mapping[str, float],
    ) -> dict[str, Tensor]:
        """The inputs of a bundle in memory that nobody else writes to: its values may be views of them.

        A number is made of what the caller says it is. Should its tensor hold another, the call is refused later, and
        no other run must find values that were computed from it.
        """
        return {
            item.name: self.numbers.known(contents[item.name])
            if item.name in contents
            else torch.full_like(tensors[item.name], scalars[item.name])
            for item in bundle.inputs
            if isinstance(item, CallInput)
        }

    def _find(self, bundle: Bundle, key: tuple[Any, ...], named: tuple[Contents, ...]) -> HoistedGroup | None:
        kept = self._kept.get(bundle.name)
        groups = None if kept is None else kept.get(key)
        if kept is None or groups is None:
            return None
        for position in range(len(groups) - 1, -1, -1):
            group = groups[position]
            if group.contents == named:
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
        counted = not per_call or bool(self.per_call & bundle.dependences - {name for name, _ in group.contents})
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
        named: tuple[Contents, ...],
    ) -> HoistedGroup:
        arguments = resolve(bundle.inputs, Sources(call=tensors, hoisted=Hoisted(tuple(groups)), batch=batch))
        self.computed[bundle.name] = self.computed.get(bundle.name, 0) + 1
        values = self.runner.run(bundle, module, arguments)
        form = self._forms.setdefault(values.layout, len(self._forms))
        stream = current_stream(values.device) if values.device.type == "cuda" else None
        return HoistedGroup(named, values, form, stream)


def _keep_for_this_stream(groups: Sequence[HoistedGroup]) -> None:
    """Values of another stream's memory are read here, maybe for longer than anybody holds them."""
    here: torch.cuda.Stream | None = None
    for group in groups:
        if group.stream is not None:
            here = here or current_stream(group.stream.device)
            if group.stream != here:
                group.values.record_stream(here)
