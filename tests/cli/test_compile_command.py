"""``fisedit compile``: what it leaves for the next process, and mistakes answered in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.test_cli import assert_clean, run


def test_the_next_process_finds_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FISEDIT_CACHE_DIR", str(tmp_path / "kept"))
    result = run("compile", "--no-progress")
    assert result.exit_code == 0, result.output
    assert "compiled for cpu" in result.output and "run eagerly" in result.output
    assert f"graphs in {tmp_path / 'kept'}" in result.output
    entries = set((tmp_path / "kept").iterdir())
    assert entries
    assert run("compile", "--no-progress", "--size", "64x64").exit_code == 0
    assert set((tmp_path / "kept").iterdir()) == entries, "the same graph"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--size", "large"), ("--size large", "768x512")),
        (("--size", "0"), ("--size 0",)),
        (("--size", "1x2x3"), ("--size 1x2x3",)),
        (("--size", "65"), ("height=65", "multiple")),
        (("--dtype", "float8"), ("float8", "bfloat16")),
        (("--device", "abacus"), ("abacus",)),
        (("no-model",), ("ModelNotFoundError", "no-model")),
    ],
)
def test_mistakes_are_answered_in_words(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    assert_clean(run("compile", *arguments), *words)


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("FISEDIT_CACHE_DIR", str(file / "kept"))
    assert_clean(run("compile"), "FISEDIT_CACHE_DIR", "kept")
