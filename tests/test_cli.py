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


def test_unwritable_output_is_a_clean_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert_clean(run("demo", "--output", str(file / "out")), "--output")


def test_unknown_device_is_a_clean_error(tmp_path: Path) -> None:
    assert_clean(run("demo", "--output", str(tmp_path), "--device", "abacus"), "abacus")


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows the message of a machine without CUDA")
def test_missing_cuda_is_a_clean_error(tmp_path: Path) -> None:
    assert_clean(run("demo", "--output", str(tmp_path), "--device", "cuda"), "--device cpu")


@pytest.mark.parametrize("option", [("--steps", "2"), ("--seed", "-1"), ("--threads", "0"), ("--steps", "many")])
def test_options_out_of_range(option: tuple[str, str]) -> None:
    assert_clean(run("demo", *option), option[0])
