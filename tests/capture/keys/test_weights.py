"""The key of weights tells contents apart, however they were written, and costs nothing while they stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fisedit_compiler.capture.keys.model import ModelState
from fisedit_compiler.capture.keys.weights import Weights


def permuted(x: Tensor) -> None:
    x.copy_(x.flip(0))


def swapped(x: Tensor) -> None:
    x[[0, 1]] = x[[1, 0]]


def one_element(x: Tensor) -> None:
    x.view(-1)[7] *= 1.01


WRITES: dict[str, Callable[[Tensor], object]] = {
    "permuted": permuted,
    "rows swapped": swapped,
    "sign flipped": lambda x: x.neg_(),
    "one sign flipped": lambda x: x.view(-1)[11:12].neg_(),
    "one element": one_element,
    "doubled": lambda x: x.mul_(2),
}
PATHS: dict[str, Callable[[nn.Parameter], Tensor]] = {
    "in place": lambda parameter: parameter,
    "by data": lambda parameter: parameter.data,
    "by numpy": lambda parameter: torch.from_numpy(parameter.detach().numpy()),
    "by dlpack": lambda parameter: torch.from_dlpack(parameter.detach()),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("size", [4, 96])
def test_every_write_is_seen(write: str, path: str, size: int) -> None:
    module = nn.Linear(size, size)
    state = ModelState(module)
    before, kept = state.read(), module.weight.detach().clone()
    with torch.no_grad():
        WRITES[write](PATHS[path](module.weight))
        assert state.read() != before
        PATHS[path](module.weight).copy_(kept)
        assert state.read() == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool, torch.uint8])
def test_every_dtype(dtype: torch.dtype) -> None:
    values = (torch.rand(64, 300) * 100).to(dtype)
    weights = Weights()
    before = weights.key({"a": values})
    other = values.clone()
    other[3] = ~other[3] if dtype == torch.bool else other[3] + 1
    assert weights.key({"a": other}) != before
    assert weights.key({"a": values.clone()}) == before, "a copy elsewhere has the same contents"


def test_a_tensor_in_another_order_of_memory_is_read_without_a_copy() -> None:
    weights = Weights()
    dense = torch.randn(8, 8, 3, 3)
    last = dense.to(memory_format=torch.channels_last)
    assert weights.key({"a": last}) == weights.key({"a": last.clone()})
    other = last.clone()
    other[1, 2, 0, 0] += 1
    assert weights.key({"a": other}) != weights.key({"a": last})


def test_the_transpose_of_a_matrix_is_another_one() -> None:
    """The same numbers lie in the same order of memory, to be read in another one."""
    weights, matrix = Weights(), torch.randn(8, 8)
    assert weights.key({"a": matrix}) != weights.key({"a": matrix.t()})


def test_half_a_write_is_seen_between_two_calls() -> None:
    module = nn.Linear(8, 8)
    state = ModelState(module)
    before = state.read()
    with torch.no_grad():
        module.bias.add_(1)
    assert state.glance() != before
    with torch.no_grad():
        module.bias.sub_(1)
    now = state.glance()
    assert now.structure == before.structure


def test_meta_has_no_contents() -> None:
    assert ModelState(nn.Linear(2, 2, device="meta")).read().weights == ""


@pytest.mark.gpu
def test_checksums_on_a_gpu_are_exact_and_cheap() -> None:
    from fisedit_compiler.kernels.triton.checksums import checksums

    values = [
        torch.randn(n, device="cuda", dtype=dtype)
        for n in (1, 3, 4096, 1_000_003)
        for dtype in (torch.half, torch.float)
    ]
    before = checksums(values)
    assert torch.equal(before, checksums(values))
    assert torch.equal(before, checksums([value.clone() for value in values]))
    for number, value in enumerate(values):
        other = [*values]
        other[number] = value.clone()
        other[number][-1] += 1
        changed = checksums(other) != before
        assert changed.nonzero().flatten().tolist() == [number]
        if len(value) > 1:
            other[number] = value.flip(0)
            assert bool((checksums(other) != before)[number])
