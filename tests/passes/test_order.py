"""The order of the package's own passes: computed from what they ask for, the same however they are registered."""

from __future__ import annotations

import random
from graphlib import CycleError

import pytest

from fisedit_compiler.passes.base import EVERY_OTHER, GraphPass
from fisedit_compiler.passes.order import REGISTERED, REWRITES, in_order


def test_every_pass_runs_once_and_has_a_name_of_its_own() -> None:
    names = [item.name for item in REWRITES]
    assert len(set(names)) == len(names) == len(REGISTERED) and set(REWRITES) == set(REGISTERED)


@pytest.mark.parametrize("seed", range(8))
def test_what_passes_ask_for_holds_however_they_are_registered(seed: int) -> None:
    shuffled = random.Random(seed).sample(REGISTERED, len(REGISTERED))
    found = in_order(shuffled)
    assert found == in_order(shuffled) and set(found) == set(REGISTERED)
    place = {item.name: number for number, item in enumerate(found)}
    asked = 0
    for item in found:
        for name in item.after:
            others = [other for other in place if other != item.name] if name == EVERY_OTHER else [name]
            assert all(place[other] < place[item.name] for other in others)
            asked += len(others)
        for name in item.before:
            others = [other for other in place if other != item.name] if name == EVERY_OTHER else [name]
            assert all(place[item.name] < place[other] for other in others)
            asked += len(others)
    assert asked > len(REGISTERED)
    assert place["extensions"] == 0 and place["outputs"] == len(place) - 1


def made(name: str, **constraints: tuple[str, ...]) -> type[GraphPass]:
    return type(name, (GraphPass,), {"name": name, **constraints})


def test_passes_that_ask_for_nothing_stay_as_they_are_given() -> None:
    passes = [made(name) for name in "cab"]
    assert in_order(passes) == tuple(passes)
    first, last = made("first", before=(EVERY_OTHER,)), made("last", after=(EVERY_OTHER,))
    assert in_order([last, *passes, first]) == (first, *passes, last)


def test_a_contradiction_and_an_unknown_name_are_errors() -> None:
    with pytest.raises(CycleError):
        in_order([made("a", after=("b",)), made("b", after=("a",))])
    with pytest.raises(ValueError, match="pass 'a' is ordered by 'gone', which is no pass"):
        in_order([made("a", before=("gone",))])
