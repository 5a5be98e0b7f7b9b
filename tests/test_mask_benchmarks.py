"""The benchmarks of masks that are found: a few pairs of the embedded model, no judged times."""

from __future__ import annotations

import json

from benchmarks import edit_extent
from fisedit_compiler.evaluation.grammar import make_pairs
from fisedit_compiler.pipelines.detectors import EarlyDifference


def test_edit_extent_keeps_what_was_decided_for_every_pair(tmp_path):
    path = tmp_path / "rows.json"
    edit_extent.main(["--pairs", "3", "--steps", "6", "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert [(row["kind"], row["edit"]) for row in rows] == [(pair.kind, pair.edit) for pair in make_pairs(3)]
    rule = EarlyDifference()
    for row in rows:
        assert len(row["quiet"]) == edit_extent.STEPS
        seen = row["quiet"][: row["calls"]]
        assert all(value > rule.clear for value in seen[:-1])
        if row["everywhere"]:
            assert row["calls"] == rule.max_calls and sum(seen) / len(seen) > rule.everywhere_ratio
            assert row["area"] == 1.0
        elif row["calls"] < rule.max_calls:
            assert seen[-1] <= rule.clear
    assert [row["everywhere"] for row in rows] == [row["kind"] == "background" for row in rows]
