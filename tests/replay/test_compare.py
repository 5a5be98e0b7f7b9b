"""Folders written by hand: what is called the same, and what is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from replay.compare import Verdict, compare_folders, compare_graphs, compare_results, main, summary

GRAPH = [
    "%x = input(call, sample) : [b, 4] float32",
    "%w = attribute(conv.weight) : [4, 4] float32",
    "%left = aten.silu(%x)",
    "%right = aten.linear(%x, %w)",
    "%sum = aten.add.Tensor(%left, %right)",
    "%kept = store($conv.input, %left)",
    "returns %sum",
]
RESULTS = {"dense": {"output of call 0": "aa"}, "recording": {"call 0 $one": "bb", "call 0 $two": "cc"}}


def renamed(lines: list[str], names: dict[str, str]) -> list[str]:
    for before, after in names.items():
        lines = [line.replace(before, after) for line in lines]
    return lines


def swapped(lines: list[str], first: int, second: int) -> list[str]:
    lines = list(lines)
    lines[first], lines[second] = lines[second], lines[first]
    return lines


def test_the_same_lines_are_the_same() -> None:
    assert compare_graphs(GRAPH, list(GRAPH)) is Verdict.SAME


@pytest.mark.parametrize("names", [{"%left": "%silu_7"}, {"$conv.input": "$conv.in"}, {"%w": "%v", "%x": "%w"}])
def test_renamed_nodes_and_slots_are_names_only(names: dict[str, str]) -> None:
    assert compare_graphs(GRAPH, renamed(GRAPH, names)) is Verdict.NAMES


def test_reordered_lines_are_order_only() -> None:
    assert compare_graphs(GRAPH, swapped(GRAPH, 2, 3)) is Verdict.ORDER


def test_both_are_names_and_order() -> None:
    lines = renamed(swapped(GRAPH, 2, 3), {"%left": "%a", "%right": "%b"})
    assert compare_graphs(GRAPH, lines) is Verdict.NAMES_AND_ORDER


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("aten.silu(%x)", "aten.relu(%x)"),
        ("aten.linear(%x, %w)", "aten.linear(%left, %w)"),
        ("Tensor(%left, %right)", "Tensor(%right, %left)"),
        ("attribute(conv.weight)", "attribute(conv.other)"),
        ("float32", "float16"),
        ("returns %sum", "returns %left"),
    ],
)
def test_other_operations_operands_and_types_are_different(before: str, after: str) -> None:
    assert compare_graphs(GRAPH, [line.replace(before, after) for line in GRAPH]) is Verdict.DIFFERENT
    # Nor are they hidden by other names and another order.
    lines = [line.replace(before, after) for line in swapped(GRAPH, 0, 1)]
    assert compare_graphs(GRAPH, renamed(lines, {"%right": "%r", "%left": "%l"})) is Verdict.DIFFERENT


def test_a_line_more_is_different() -> None:
    assert compare_graphs(GRAPH, [*GRAPH[:-1], "%more = aten.silu(%x)", GRAPH[-1]]) is Verdict.DIFFERENT


@pytest.mark.parametrize(
    ("now", "verdict"),
    [
        (RESULTS, Verdict.SAME),
        ({**RESULTS, "recording": {"call 0 $1": "bb", "call 0 $two": "cc"}}, Verdict.NAMES),
        ({**RESULTS, "recording": {"call 0 $two": "cc", "call 0 $one": "bb"}}, Verdict.ORDER),
        ({**RESULTS, "recording": {"call 0 $2": "cc", "call 0 $1": "bb"}}, Verdict.NAMES_AND_ORDER),
        ({**RESULTS, "recording": {"call 0 $one": "bb", "call 0 $two": "c0"}}, Verdict.DIFFERENT),
        ({**RESULTS, "dense": {"output of call 0": "bb"}}, Verdict.DIFFERENT),
        ({"dense": RESULTS["dense"]}, Verdict.DIFFERENT),
    ],
)
def test_results_go_by_their_digests(now: dict[str, dict[str, str]], verdict: Verdict) -> None:
    assert compare_results(RESULTS, now) is verdict


def write(folder: Path, graph: list[str] = GRAPH, results: object = RESULTS, stage: str = "0-step") -> Path:
    for section in ("stages", "slots", "plans", "lowered", "results"):
        (folder / "tiny" / "variant" / section).mkdir(parents=True)
    place = folder / "tiny" / "variant"
    (place / "stages" / f"{stage}.txt").write_text("\n".join(graph))
    (place / "slots" / "0.txt").write_text("$one [2] float32 canvas of %left\n$two [2] float32 dense of %x\n")
    (place / "plans" / "block.txt").write_text("active(1) = [3] int64 00ff\n")
    (place / "lowered" / "0-step.txt").write_text("\n".join(GRAPH))
    (place / "results" / "digests.json").write_text(json.dumps(results))
    return folder


def test_folders_that_are_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, now = write(tmp_path / "base"), write(tmp_path / "now")
    assert main([str(base), str(now)]) == 0
    printed = capsys.readouterr().out.split()
    assert printed[-2:] == ["all", "same"]
    assert "==" not in printed


def test_names_and_order_are_no_failure_and_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write(tmp_path / "base")
    now = write(tmp_path / "now", renamed(swapped(GRAPH, 2, 3), {"%left": "%a", "%right": "%b"}))
    assert main([str(base), str(now), "--lines", "0", "--diff", str(tmp_path / "whole.diff")]) == 0
    printed = capsys.readouterr().out
    assert "stages/0-step.txt: names and order" in printed
    assert "-%left = aten.silu(%x)" in printed
    assert "+%a = aten.silu(%x)" in (tmp_path / "whole.diff").read_text()


def test_a_changed_operation_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write(tmp_path / "base")
    now = write(tmp_path / "now", [line.replace("silu", "relu") for line in GRAPH])
    assert main([str(base), str(now)]) == 1
    assert "+%left = aten.relu(%x)" in capsys.readouterr().out
    row = next(line for line in summary(compare_folders(base, now)) if line.startswith("tiny"))
    assert row.split() == ["tiny", "different", "same", "same", "same", "same"]


def test_a_changed_digest_fails(tmp_path: Path) -> None:
    results = {**RESULTS, "dense": {"output of call 0": "ab"}}
    base, now = write(tmp_path / "base"), write(tmp_path / "now", results=results)
    assert main([str(base), str(now)]) == 1
    row = next(line for line in summary(compare_folders(base, now)) if line.startswith("tiny"))
    assert row.split() == ["tiny", "same", "same", "same", "same", "different"]


def test_a_renamed_stage_is_found_again(tmp_path: Path) -> None:
    base, now = write(tmp_path / "base"), write(tmp_path / "now", stage="0-sparse")
    (found,) = [file for file in compare_folders(base, now) if file.verdict is not Verdict.SAME]
    assert found.verdict is Verdict.NAMES
    assert found.title == "tiny/variant/stages/0-step.txt -> tiny/variant/stages/0-sparse.txt: names only"


def test_a_missing_file_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, now = write(tmp_path / "base"), write(tmp_path / "now")
    (now / "tiny" / "variant" / "plans" / "block.txt").unlink()
    assert main([str(base), str(now)]) == 1
    assert "plans/block.txt: only at the base" in capsys.readouterr().out


def test_nothing_written_fails(tmp_path: Path) -> None:
    assert main([str(tmp_path), str(tmp_path)]) == 1
