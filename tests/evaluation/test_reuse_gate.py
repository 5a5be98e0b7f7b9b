"""The gate of reuse across steps: what holds is answered from records alone."""

from __future__ import annotations

from typing import Any

import pytest

from fisedit_compiler.evaluation.measures.reuse_gate import reuse_requirements


def record(psnr: float | None, directional: float = 0.8, image: float = 0.5) -> dict[str, Any]:
    without = {"directional_similarity": 0.8, "image_similarity": 0.5}
    found = {"psnr_inside_to_full": psnr, "directional_similarity": directional, "image_similarity": image}
    return {"methods": {"default": without, "reuse@0.2": {"skipped": "none"} if psnr is None else found}}


def answers(records: list[dict[str, Any]]) -> list[bool | None]:
    return [requirement.passed for requirement in reuse_requirements(records)]


def test_nothing_is_asked_where_nothing_was_reused() -> None:
    assert reuse_requirements([{"methods": {"default": {}, "dense": {}}}]) == []


def test_each_of_its_parts_can_fail() -> None:
    assert answers([record(40.0)] * 20) == [True, True, True, True]
    assert answers([record(34.0)] * 20) == [False, True, True, True]
    assert answers([record(40.0)] * 18 + [record(27.0)] * 2) == [True, False, True, True]
    assert answers([record(40.0)] * 19 + [record(27.0)]) == [True, True, True, True]
    assert (
        answers([record(40.0, directional=0.79)])
        == answers([record(40.0, directional=0.81)])
        == [True] * 2
        + [
            False,
            True,
        ]
    )
    assert answers([record(40.0, image=0.497)]) == [True, True, True, False]
    assert answers([record(40.0, image=0.9)]) == [True, True, True, True]


def test_pairs_that_had_nothing_to_do_do_not_count() -> None:
    found = reuse_requirements([record(40.0), record(None)])
    assert {requirement.pairs for requirement in found} == {1} and found[0].value == pytest.approx(40.0)
    assert answers([record(None)]) == [None] * 4
