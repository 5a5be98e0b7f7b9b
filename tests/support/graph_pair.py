"""A zoo model compiled twice, with CUDA graphs and eagerly, and what is compared of the two."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fisedit_compiler import Recording, SparseModule, SparsifyConfig, sparsify
from fisedit_compiler.kernels.tolerances import assert_close
from fisedit_compiler.runtime.execution.cuda_graphs import GraphPool
from tests.support.zoo import ZOO, Inputs, ZooModel

SIZE = (24, 40)
CALLS = 2


@dataclass(frozen=True)
class Pair:
    """A zoo model compiled twice on one device: with graphs, and eagerly for comparison."""

    model: ZooModel
    graphs: SparseModule
    eager: SparseModule
    dtype: torch.dtype
    device: str

    def inputs(self, seed: int = 0) -> Inputs:
        return move(self.model.make_inputs(2, *SIZE, seed), self.device, self.dtype)

    def record(self, inputs: Inputs) -> tuple[Recording, list[Tensor]]:
        """A run of a few calls at different timesteps; both modules can edit it. Also its outputs."""
        with self.graphs.record() as recording:
            outputs = [self.graphs(**call)[0] for call in calls_of(inputs)]
        return recording, outputs

    def edit(self, module: SparseModule, recording: Recording, inputs: Inputs, mask: Tensor) -> list[Tensor]:
        with module.edit(recording, mask):
            return [module(**call)[0] for call in calls_of(inputs)]

    def edited(self, inputs: Inputs, mask: Tensor, seed: int = 1) -> Inputs:
        """Another text, and the sample changed inside the mask."""
        return self.model.edit_inputs(inputs, mask.to(self.device), seed)

    def check(self, recording: Recording, inputs: Inputs, mask: Tensor, what: object = "") -> list[Tensor]:
        """Assert that an edit with graphs is the eager edit, and give its outputs."""
        actual = self.edit(self.graphs, recording, inputs, mask)
        expected = self.edit(self.eager, recording, inputs, mask)
        for now, then in zip(actual, expected, strict=True):
            try:
                assert_close(now, then, self.dtype)
            except AssertionError as error:
                raise AssertionError(f"{what}: {error}") from error
        return actual

    @property
    def pool(self) -> GraphPool:
        """The pool of the step; edits that record and those that do not share it."""
        (executable,) = self.graphs._programs._executables.values()
        assert [*executable._pools] == ["update"], "the step ran without graphs, or with more than are needed"
        return executable._pools["update"]

    def record_edit(
        self, module: SparseModule, recording: Recording, inputs: Inputs, mask: Tensor, copies: int = 1
    ) -> tuple[list[Tensor], tuple[Recording, ...]]:
        with module.edit(recording, mask, record=True, copies=copies) as session:
            outputs = [module(**call)[0] for call in calls_of(inputs)]
        return outputs, session.results

    def check_recorded(
        self, recording: Recording, inputs: Inputs, mask: Tensor, what: object = "", copies: int = 1
    ) -> tuple[Recording, ...]:
        """Assert that a recorded edit with graphs is the eager one, slot by slot, and give its recordings."""
        outputs, results = self.record_edit(self.graphs, recording, inputs, mask, copies)
        expected, eager = self.record_edit(self.eager, recording, inputs, mask, copies)
        for now, then in zip(outputs, expected, strict=True):
            assert_close(now, then, self.dtype)
        for result, other in zip(results, eager, strict=True):
            assert result.own_bytes_per_call == other.own_bytes_per_call, (what, "rows of padding were kept")
            for call, slots in enumerate(other):
                for name, value in slots.slots.items():
                    try:
                        assert_close(result.slot(call, name).float(), value.float(), self.dtype)
                    except AssertionError as error:
                        raise AssertionError(f"{what}: call {call}, {name}: {error}") from error
        return results


def calls_of(inputs: Inputs) -> list[Inputs]:
    return [{**inputs, "timestep": torch.tensor(900 - 300 * call)} for call in range(CALLS)]


def move(value: Any, device: str, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {key: move(item, device, dtype) for key, item in value.items()}
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    return value


def make_pair(name: str, dtype: torch.dtype, device: str) -> Pair:
    """Fresh modules with their own weights, pool and caches."""
    zoo_model = ZOO[name]()
    module = copy.deepcopy(zoo_model.module).to(device, dtype)
    graphs = sparsify(module, SparsifyConfig(backend="inductor", dense_above=1.0))
    eager = sparsify(module, SparsifyConfig(backend="eager", dense_above=1.0))
    return Pair(replace(zoo_model, module=module), graphs, eager, dtype, device)


shared_pair = cache(make_pair)
"""Compiled once per process: Inductor takes most of a minute."""


@contextmanager
def forced_block_size(pair: Pair, size: int) -> Iterator[None]:
    """Edits with graphs compute convolutions in blocks of ``size`` inside the block."""
    plans = [executable.plans for executable in pair.graphs._programs._executables.values()]
    configs = [each._config for each in plans]
    for each, config in zip(plans, configs, strict=True):
        each._config = replace(config, block_size=size)
        each.recent.clear()
    try:
        yield
    finally:
        for each, config in zip(plans, configs, strict=True):
            each._config = config
            each.recent.clear()


def box(top: int, left: int, size: int = 8) -> Tensor:
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[top : top + size, left : left + size] = True
    return mask


MASKS = ("site", "scattered", "block", "border", "row", "checkerboard", "full")
