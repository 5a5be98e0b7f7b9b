"""The report of an edit as people read it."""

from __future__ import annotations

import pytest

from fisedit_compiler.pipelines import EditReport

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
