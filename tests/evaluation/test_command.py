"""``fisedit eval`` on the command line."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from fisedit_compiler.cli import INTERRUPTED, USER_ERROR, app
from fisedit_compiler.errors import ConfigError
from fisedit_compiler.evaluation.command import parse_shard, run_evaluation
from fisedit_compiler.evaluation.pairs.grammar import make_pairs
from fisedit_compiler.evaluation.pairs.pairs import read_pairs
from fisedit_compiler.evaluation.results.store import Store
from fisedit_compiler.evaluation.runner import Evaluation, Runner

ORIGINAL_LOAD = Runner.__dict__["load"]
METHODS = ("--methods", "dense,sparse", "--methods", "sdedit@0.5")


def run(*arguments: str | Path) -> Result:
    words = ["eval", *map(str, arguments)]
    return CliRunner().invoke(app, words, env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def assert_clean(result: Result, *words: str) -> None:
    assert result.exit_code == USER_ERROR, result.output
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.output


def test_pairs_are_made_with_a_seed(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    result = run("--make-pairs", "20", "--seed", "3", path)
    assert result.exit_code == 0, result.output
    assert "20 pairs" in result.output and "14 object" in result.output
    assert [pair.to_dict() for pair in read_pairs(path).pairs] == [pair.to_dict() for pair in make_pairs(20, 3)]
    assert_clean(run("--make-pairs", "20", path), "is there already")


def test_an_evaluation_writes_its_files_and_names_what_was_wrong(evaluation: Evaluation) -> None:
    with evaluation.pairs.open("a") as file:
        file.write("nonsense\n")
    result = run(evaluation.pairs, "--output", evaluation.output, "--steps", "6", *METHODS, "--no-images")
    assert result.exit_code == 0, result.output
    assert f"{evaluation.pairs}:4: not JSON" in result.output
    results = json.loads((evaluation.output / "results.json").read_text())
    assert results["counts"]["done"] == 3 and results["run"]["rejected"]
    assert [method["name"] for method in results["methods"]] == ["dense", "sparse", "sdedit@0.5"]
    assert "<svg" in (evaluation.output / "report.html").read_text()
    assert "fisedit eval pairs.jsonl" in (evaluation.output / "quality.md").read_text()

    (evaluation.output / "results.json").unlink()
    again = run("--report-only", "--output", evaluation.output)
    assert again.exit_code == 0, again.output
    assert json.loads((evaluation.output / "results.json").read_text()) == results


def test_ctrl_c_ends_with_its_own_code_and_the_way_on(
    evaluation: Evaluation, interrupt: Callable[..., Callable[[], None]]
) -> None:
    mend = interrupt(2, KeyboardInterrupt())
    arguments = (evaluation.pairs, "--output", evaluation.output, "--steps", "6", *METHODS)
    result = run(*arguments)
    assert result.exit_code == INTERRUPTED
    assert "the same command goes on" in result.output
    mend()
    assert run(*arguments).exit_code == 0
    assert json.loads((evaluation.output / "results.json").read_text())["counts"]["done"] == 3


def test_if_every_pair_fails_the_exit_code_says_so(evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr("fisedit_compiler.evaluation.runner.Runner._case", broken)
    result = run(evaluation.pairs, "--output", evaluation.output, "--steps", "6", *METHODS)
    assert result.exit_code == 1
    assert "line 1 failed: RuntimeError: out of luck" in result.output


def test_another_configuration_needs_fresh(evaluation: Evaluation) -> None:
    arguments = (evaluation.pairs, "--output", evaluation.output, *METHODS, "--limit", "1")
    assert run(*arguments, "--steps", "6").exit_code == 0
    assert_clean(run(*arguments, "--steps", "7"), "ConfigError", "--fresh")
    assert run(*arguments, "--steps", "7", "--fresh").exit_code == 0


def test_the_bars_name_pairs_and_methods(evaluation: Evaluation) -> None:
    console = Console(file=StringIO(), force_terminal=True, width=100)
    run_evaluation(replace(evaluation, limit=1), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "pairs" in text and "1/1" in text


def test_a_misspelt_model_can_be_mended(
    evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = (evaluation.pairs, "--output", evaluation.output, *METHODS, "--limit", "1", "--steps", "6")
    with monkeypatch.context() as unpatched:
        unpatched.setattr("fisedit_compiler.evaluation.runner.Runner.load", ORIGINAL_LOAD)
        assert_clean(run(*arguments, "--model", tmp_path / "none"), "ModelNotFoundError")
    assert run(*arguments).exit_code == 0


def test_fresh_is_refused_for_later_shards(evaluation: Evaluation) -> None:
    with pytest.raises(ConfigError, match="other shards"):
        run_evaluation(replace(evaluation, shard=(2, 2)), Console(), fresh=True)


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2", "1/2/3"])
def test_wrong_shards(text: str) -> None:
    with pytest.raises(ConfigError, match="i/n"):
        parse_shard(text)


def test_a_shard() -> None:
    assert parse_shard("2/8") == (2, 8)


def test_wrong_arguments_are_clean_errors(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    assert_clean(run(), "--make-pairs")
    assert_clean(run(pairs, "--output", tmp_path / "o"), "cannot read the pairs")
    assert_clean(run("--make-pairs", "2", tmp_path / "none" / "p.jsonl"), "name another file")
    assert_clean(run("--report-only", "--output", tmp_path), "holds no evaluation")
    pairs.write_text(json.dumps({"input": "a cat", "edit": "", "output": "a dog"}))
    assert_clean(run(pairs, "--output", tmp_path / "o", "--methods", "magic"), "unknown method 'magic'")
    assert_clean(run(pairs, "--output", tmp_path / "o", "--suite", "magic"), "unknown suite")
    assert_clean(run(pairs, "--output", tmp_path / "o", "--shard", "9"), "--shard")
    assert_clean(run(pairs, "--output", tmp_path / "o", "--device", "abacus"), "abacus")
    assert_clean(run(pairs, "--output", tmp_path / "p", "--model", tmp_path / "m"), "ModelNotFoundError")
    assert_clean(run(pairs, "--output", tmp_path / "q", "--clip", tmp_path), "no config.json")
    assert_clean(run(pairs, "--output", tmp_path / "r", "--dtype", "int3"), "unknown dtype")
    assert_clean(run(pairs, "--output", tmp_path / "s", "--backend", "magic"), "SparsifyConfig.backend")


def test_an_evaluation_in_a_folder_with_brackets(evaluation: Evaluation, tmp_path: Path) -> None:
    output = tmp_path / "[" / "x]"
    result = run(evaluation.pairs, "--output", output, "--steps", "6", "--limit", "1", *METHODS)
    assert result.exit_code == 0, result.output
    assert str(output) in result.output
    assert run("--report-only", "--output", output).exit_code == 0


def test_a_disk_that_fills_up_ends_the_run_and_keeps_what_is_finished(
    evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pair that met it is not called failed, and the same command goes on."""
    write = Store.write_bytes
    with monkeypatch.context() as full:

        def failing(store: Store, name: str, content: bytes) -> Path:
            if "000002" in name:
                full.setattr("os.fsync", no_space)
            return write(store, name, content)

        full.setattr(Store, "write_bytes", failing)
        arguments = (evaluation.pairs, "--output", evaluation.output, "--steps", "6", *METHODS)
        result = run(*arguments)
        assert_clean(result, "StoreError", "No space left", "pairs that are finished stay")
    assert [record["line"] for record in Store(evaluation.output).records()] == [1]
    assert not list(evaluation.output.rglob("*.tmp")), "no litter"
    assert run("--report-only", "--output", evaluation.output).exit_code == 0
    assert run(*arguments).exit_code == 0
    assert json.loads((evaluation.output / "results.json").read_text())["counts"]["done"] == 3


def no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("text", ["[]", "{}", "", "null", "\x00", '{"methods": 3}', "[" * 100_000])
def test_a_damaged_configuration_is_a_clean_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    assert_clean(run("--report-only", "--output", tmp_path), "holds no evaluation")
