"""The page of results over commits: a column for every commit that changed a file, a line for every figure."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results() -> Any:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        return importlib.import_module("results")
    finally:
        sys.path.pop(0)


def result(ratio: float, **more: Any) -> dict[str, Any]:
    rows = [{"model": "sd21", "requested_fraction": 0.05, "sparse_ms": 3.0, "ratio": ratio, "ratio_iqr": 0.1}]
    return {
        "benchmark": "step_latency",
        "machine": {"gpu": "NVIDIA H100"},
        "versions": {"torch": "2.11"},
        "rows": rows,
    } | more


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    return tmp_path


def write(repository: Path, name: str, content: Any) -> None:
    (repository / "benchmarks" / "results" / name).write_text(json.dumps(content))


def commit(repository: Path) -> None:
    who = ("-c", "user.name=A", "-c", "user.email=a@b.c")
    for arguments in (("init", "-q"), ("add", "."), (*who, "commit", "-qm", "Measure")):
        subprocess.run(["git", *arguments], cwd=repository, check=True)


def cells(page: str, start: str) -> list[str]:
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_column_for_every_commit_and_one_for_what_is_not_committed(results: Any, repository: Path) -> None:
    for ratio in (4.0, 5.5):
        write(repository, "h100.json", result(ratio))
        commit(repository)
    write(repository, "h100.json", result(6.25))
    page = results.results_page(repository)
    assert cells(page, "sd21, 5.0%") == ["sd21, 5.0%", "`ratio`", "4", "5.5", "6.25"]
    head = cells(page, "row")
    assert head[-1] == "now<br>NVIDIA H100, torch 2.11" and len(set(head)) == 5
    assert "sparse_ms" not in page and "iqr" not in page, "a row with ratios shows those"


def test_a_file_that_was_renamed_keeps_its_past(results: Any, repository: Path) -> None:
    write(repository, "old.json", result(4.0))
    commit(repository)
    (repository / "benchmarks" / "results" / "old.json").rename(repository / "benchmarks" / "results" / "new.json")
    commit(repository)
    assert cells(results.results_page(repository), "sd21")[2:] == ["4", "4"]


def test_without_git_the_files_as_they_are(results: Any, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(repository, "h100.json", {"question": "?", "before": result(1.0), "after": result(2.0)})
    write(repository, "none.json", {"methods": {}})
    monkeypatch.setenv("PATH", "")
    page = results.results_page(repository)
    assert cells(page, "sd21")[2:] == ["1", "2"] and "now before" in page and "none.json" not in page


def test_every_result_of_the_repository_with_rows_is_there(results: Any) -> None:
    page = results.results_page()
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        known = json.loads(path.read_text())
        if 0 < len(known.get("rows", ())) <= results.MOST_ROWS:
            assert f"## {path.name}" in page, path.name
