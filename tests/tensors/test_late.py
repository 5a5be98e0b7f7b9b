"""Tensors made when somebody asks for one: which are made, how often, and how large they are said to be."""

from __future__ import annotations

import torch
from torch import Tensor

from fisedit_compiler.tensors.late import LateMapping, LateTensors, nbytes_of


def row() -> tuple[LateTensors, list[int]]:
    """Four tensors, of which the middle two are made later; and how often they were."""
    times: list[int] = []
    memory = torch.arange(5.0)

    def make(made: list[Tensor | None]) -> None:
        times.append(1)
        made[1:3] = memory.split([2, 3])

    made: list[Tensor | None] = [torch.zeros(1), None, None, torch.ones(4)]
    return LateTensors(made, make, [4, 8, 12, 16]), times


def test_what_is_there_is_given_without_making_the_others() -> None:
    late, times = row()
    assert len(late) == 4 and torch.equal(late[0], torch.zeros(1)) and torch.equal(late[-1], torch.ones(4))
    assert [value.numel() for value in late[3:]] == [4] and not times


def test_all_are_made_when_one_is_asked_for() -> None:
    late, times = row()
    assert late[1].tolist() == [0.0, 1.0] and [value.numel() for value in late[1:]] == [2, 3, 4]
    assert late[2] is late[2] and times == [1]


def test_some_of_them_have_names() -> None:
    late, times = row()
    named = LateMapping(late, {"first": 1, "last": 3})
    assert nbytes_of(named) == 24 and list(named) == ["first", "last"] and len(named) == 2 and not times
    assert named["first"].tolist() == [0.0, 1.0] and "other" not in named
    assert nbytes_of(dict(named)) == 24
