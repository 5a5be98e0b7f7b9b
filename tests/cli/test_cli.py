"""The command line's manners: versions, help, and mistakes answered without a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from fisedit_compiler.cli import USER_ERROR, app


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def assert_clean(result: Result, *words: str) -> None:
    assert result.exit_code == USER_ERROR, result.output
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.output


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.output.startswith("fisedit-compiler ")


def test_help_names_the_commands() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "demo" in result.output
    assert run("demo", "--help").exit_code == 0


def test_missing_model_is_a_clean_error(tmp_path: Path) -> None:
    missing = tmp_path / "no-model"
    result = run("demo", "--model", str(missing), "--output", str(tmp_path / "out"))
    assert_clean(result, "ModelNotFoundError", "no-model")


def test_folder_that_is_no_model_is_a_clean_error(tmp_path: Path) -> None:
    assert_clean(run("demo", "--model", str(tmp_path), "--output", str(tmp_path / "out")), "model_index.json")


@pytest.mark.parametrize("command", ["demo", "inspect"])
def test_a_damaged_model_is_a_clean_error(command: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("[]")
    arguments = {"demo": ("--model", str(tmp_path)), "inspect": (str(tmp_path), "--svg", str(tmp_path / "x.svg"))}
    assert_clean(run(command, *arguments[command]), "ModelNotFoundError", "model_index.json is no index")


def test_unwritable_output_is_a_clean_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert_clean(run("demo", "--output", str(file / "out")), "--output")


def test_unknown_device_is_a_clean_error(tmp_path: Path) -> None:
    assert_clean(run("demo", "--output", str(tmp_path), "--device", "abacus"), "abacus")


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows the message of a machine without CUDA")
def test_missing_cuda_is_a_clean_error(tmp_path: Path) -> None:
    assert_clean(run("demo", "--output", str(tmp_path), "--device", "cuda"), "--device cpu")


@pytest.mark.parametrize(
    "option",
    [
        ("--steps", "0"),
        ("--guidance", "-1"),
        ("--guidance", "nan"),
        ("--steps", "many"),
        ("--seed", "-1"),
        ("--seed", "99999999999999999999"),
        ("--threads", "0"),
        ("--threads", str(10**12)),
        ("--threads", "100000"),
    ],
)
def test_options_out_of_range(option: tuple[str, str]) -> None:
    assert_clean(run("demo", *option), option[0])


@pytest.mark.parametrize("device", ["meta", "mps:9", "xpu", "privateuseone", "", "cuda:-1", "[/]"])
def test_devices_that_compute_nothing_are_refused(device: str, tmp_path: Path) -> None:
    assert_clean(run("demo", "--output", str(tmp_path), "--device", device), "--device cpu")


@pytest.mark.parametrize(
    "arguments",
    [
        ("demo", "--model", "x" * 300),
        ("demo", "--output", "x" * 300),
        ("inspect", "--html", "x" * 300),
        ("inspect", "x" * 300, "--svg", "program.svg"),
        ("eval", "x" * 300),
        ("eval", "--make-pairs", "3", "x" * 300),
        ("eval", "--make-pairs", "99999999999999999999", "pairs.jsonl"),
        ("eval", "--make-pairs", "3", "--seed", "99999999999999999999", "pairs.jsonl"),
        ("eval", "--report-only", "--output", "x" * 300),
        ("eval", "pairs.jsonl", "--guidance", "1e400"),
        ("eval", "pairs.jsonl", "--guidance", "nan"),
        ("eval", "pairs.jsonl", "--threads", str(10**12)),
        ("eval", "pairs.jsonl", "--shard", "1/" + "9" * 5000),
        ("eval", "pairs.jsonl", "--limit", "0"),
    ],
)
def test_absurd_options_are_clean_errors(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_clean(run(*arguments))


def test_brackets_in_names_are_no_markup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """rich takes ``[/x]`` for the end of a style, and raises if there is none."""
    monkeypatch.chdir(tmp_path)
    Path("[").mkdir()
    result = run("eval", "--make-pairs", "3", "[/x].jsonl")
    assert result.exit_code == 0, result.output
    assert "[/x].jsonl" in result.output


def test_names_that_are_no_characters_are_shown(tmp_path: Path) -> None:
    """A file's name may hold any byte; printing one must not end a run."""
    assert_clean(run("eval", str(tmp_path / "x\udcff.jsonl")), "udcff")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(30, "Read-only"), MemoryError()])
def test_full_disks_and_memories_are_one_line(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr("fisedit_compiler.evaluation.command.make_pairs_file", fails)
    result = run("eval", "--make-pairs", "3", str(tmp_path / "pairs.jsonl"))
    assert_clean(result, "error:")
    assert len(result.output.strip().splitlines()) == 1
