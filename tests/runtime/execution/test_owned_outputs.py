"""What a graph returns, copied out of its memory: each result has its own, without the rows of padding."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from fisedit_compiler.runtime.execution.owned_outputs import OwnedOutputs
from tests.support.graph_stand_in import patch_cuda

LEVEL = Fraction(1)
ROWS = {1: (1, LEVEL), 2: (2, LEVEL), 3: (1, LEVEL), 5: (1, LEVEL)}


def rows_of(count: int) -> dict[Fraction, int]:
    return {LEVEL: count}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        patch_cuda(monkeypatch)
    return request.param


def outputs_on(device: str) -> list[Tensor]:
    padded = torch.randn(2, 16, 4, 8, device=device)
    return [
        torch.randn(2, 4, 6, 6, device=device),
        padded.flatten(2).half(),
        padded.transpose(1, 2),
        torch.rand(2, 16, 8, device=device) < 0.5,  # bytes, which no word of two fits
        torch.randn(2, 1, 2, device=device).expand(2, 8, 2),
        padded[..., 0],
    ]


def test_results_have_memory_of_their_own_without_padded_rows(device: str) -> None:
    outputs, owned = outputs_on(device), OwnedOutputs(ROWS)
    kept: list[tuple[list[Tensor], list[Tensor]]] = []
    for count in (16, 11, 11, 1, 16):
        for output in outputs[:4]:
            output.copy_(torch.rand(output.shape, device=device) < 0.5)  # a replay writes there
        found = owned.of(outputs, rows_of(count))
        expected = [
            output.narrow(ROWS[position][0], 0, count) if position in ROWS else output
            for position, output in enumerate(outputs)
        ]
        assert all(map(torch.equal, found, expected))
        for value in found[:4]:
            assert value.untyped_storage().nbytes() == value.nbytes
        kept.append((found, [value.clone() for value in found]))
    for found, then in kept:
        assert all(map(torch.equal, found, then)), "a later call wrote to an earlier result"
    storages = [value.untyped_storage().data_ptr() for found, _ in kept for value in found]
    assert len(set(storages)) == len(storages)


def test_what_lives_and_dies_together_shares_memory_and_nothing_else_does(device: str) -> None:
    outputs = [torch.randn(2, 16, 8, device=device) for _ in range(5)]
    outputs += [torch.randn(2, 16, 4, device=device), torch.randn(2, 16, 8, device=device).half()]
    outputs += [torch.randn(2, 3, 1, device=device), torch.randn(2, 16, 2, device=device)]
    rows = dict.fromkeys(range(7), (1, LEVEL))
    # The eighth has a length that would leave the next one unaligned, the ninth is nobody's, the last ones have heads.
    outputs += [torch.randn(2, 16, 8, device=device).unflatten(2, (2, 4)).movedim(2, 1) for _ in range(2)]
    rows |= {9: (2, LEVEL), 10: (2, LEVEL)}
    owned = OwnedOutputs(rows, {0: "a", 1: "b", 2: "a", 3: "a", 4: "b", 5: "a", 6: "a", 7: "a", 9: "a", 10: "a"})
    kept = []
    for count, unread in ((16, frozenset()), (12, frozenset({2})), (12, frozenset()), (16, frozenset())):
        for output in outputs:
            output.normal_()
        found = owned.of(outputs, rows_of(count), unread)
        places = [place for place in range(len(outputs)) if place not in unread]
        expected = [
            outputs[place].narrow(rows[place][0], 0, count) if place in rows else outputs[place] for place in places
        ]
        assert all(map(torch.equal, found, expected))
        storages = {place: value.untyped_storage() for place, value in zip(places, found, strict=True)}
        addresses = {place: storage.data_ptr() for place, storage in storages.items()}
        alike: dict[int, set[int]] = {}
        for place, address in addresses.items():
            alike.setdefault(address, set()).add(place)
        assert sorted(map(sorted, alike.values())) == sorted(
            sorted({*group} - unread) for group in ([0, 2, 3, 5, 7, 9, 10], [1, 4], [6], [8])
        )
        sizes = {address: 0 for address in alike}
        for place, value in zip(places, found, strict=True):
            in_order = value if place < 9 else value.movedim(1, 2)  # rows before heads, as the step made them
            assert in_order.is_contiguous() and value.data_ptr() % 16 == 0
            sizes[addresses[place]] += -(-value.nbytes // 16) * 16 if place in owned.together else value.nbytes
        assert all(storage.nbytes() == sizes[addresses[place]] for place, storage in storages.items())
        kept.append((found, [value.clone() for value in found]))
    for found, then in kept:
        assert all(map(torch.equal, found, then)), "a later call wrote to an earlier result"


def test_more_outputs_than_a_launch_has_targets_are_copied_all_the_same(device: str) -> None:
    outputs = [torch.randn(2, 16, 8, device=device) for _ in range(40)]
    owned = OwnedOutputs(dict.fromkeys(range(40), (1, LEVEL)), {place: place // 2 for place in range(0, 40)})
    found = owned.of(outputs, rows_of(9))
    assert all(map(torch.equal, found, [output[:, :9] for output in outputs]))
    assert all(value.is_contiguous() for value in found)
