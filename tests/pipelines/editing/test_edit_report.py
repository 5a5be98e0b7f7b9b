"""The report of an edit as people read it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fisedit_compiler.pipelines import EditReport
from fisedit_compiler.pipelines.editing.report import Decoding

DENSE, SPARSE, SKIPPED = ("dense", 0.2), ("sparse", 0.1), ("skipped", 0.0)


@pytest.mark.parametrize(
    ("calls", "partial", "lines"),
    [
        (
            [DENSE, SPARSE, SPARSE],
            1,
            ["dense     1 call, partly recorded already, 200.0 ms", "sparse    2 calls, 100.0 ms each (median)"],
        ),
        ([DENSE] * 4, 1, ["dense     4 calls (1 partly recorded already), 200.0 ms each (median)"]),
        ([DENSE] * 2, 0, ["dense     2 calls, 200.0 ms each (median)"]),
        ([SPARSE], 0, ["sparse    1 call, 100.0 ms"]),
        ([SKIPPED], 0, ["skipped   1 call"]),
        ([SKIPPED] * 3, 0, ["skipped   3 calls"]),
    ],
)
def test_calls_are_counted_in_words_that_agree(calls, partial, lines):
    text = str(EditReport("user", 0.1, calls=calls, partial_calls=partial))
    assert [line for line in text.splitlines() if line.split()[0] in ("dense", "sparse", "skipped")] == lines


def test_how_the_picture_was_decoded() -> None:
    report = EditReport(mask_source="user", area=0.05)
    assert "decoder" not in str(report)
    for decode, line in (
        (Decoding("sparse", 0.165, 0.0801), "decoder   16.5% of the sites with a border, 80.1 ms"),
        (Decoding("dense", 1.0, 0.37, "tiling is on"), "decoder   the whole picture, 370.0 ms (tiling is on)"),
        (Decoding("skipped", 0.0, 0.0), "decoder   none, the picture is the base's"),
    ):
        assert line in str(replace(report, decode=decode)).splitlines()
