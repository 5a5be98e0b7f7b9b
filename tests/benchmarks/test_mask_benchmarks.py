"""The benchmarks of masks that are found: a few pairs of the embedded model, no judged times."""

from __future__ import annotations

import json

import pytest

from benchmarks import edit_extent, mask_stability
from benchmarks.support.first_steps import STEPS
from fisedit_compiler.evaluation.pairs.grammar import make_pairs
from fisedit_compiler.pipelines.detectors import EarlyDifference, mask_detectors
from fisedit_compiler.pipelines.detectors.base import SHORT_RUN


@pytest.mark.parametrize("steps", [10, SHORT_RUN])
def test_edit_extent_keeps_what_was_decided_for_every_pair(tmp_path, steps):
    path = tmp_path / "rows.json"
    edit_extent.main(["--pairs", "3", "--steps", str(steps), "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert [(row["kind"], row["edit"]) for row in rows] == [(pair.kind, pair.edit) for pair in make_pairs(3)]
    rule = EarlyDifference()
    looks = rule.looks(steps)
    for row in rows:
        assert len(row["quiet"]) == STEPS
        seen = row["quiet"][: row["calls"]]
        assert all(value > rule.clear for value in seen[:-1])
        if row["everywhere"]:
            assert row["calls"] == looks and sum(seen) / len(seen) > rule.everywhere_ratio
            assert row["area"] == 1.0
        elif row["calls"] < looks:
            assert seen[-1] <= rule.clear
    assert [row["everywhere"] for row in rows] == [row["kind"] == "background" for row in rows]


def test_mask_stability_compares_the_same_pairs_with_and_without_reuse(tmp_path):
    path = tmp_path / "rows.json"
    mask_stability.main(["--pairs", "1", "--steps", "7", "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    keys = {(row["detector"], row["reuse"], row["step"]) for row in rows}
    assert keys == {(d, r, s) for d in mask_detectors() for r in mask_stability.REUSE for s in range(1, STEPS + 1)}
    for row in rows:
        assert row["pairs"] == 1 and 0.0 <= row["to_last"] <= 1.0
        if row["reuse"] == "none":
            assert row["quiet_change"] == row["to_last_change"] == 0.0
        if row["step"] == STEPS:
            assert row["to_last"] == 1.0
    steps = [row["quiet"] for row in rows if (row["detector"], row["step"]) == ("early-difference", 2)]
    assert len(set(steps)) == len(steps), "reused maps took part"
