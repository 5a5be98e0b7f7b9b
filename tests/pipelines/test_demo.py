"""The demo's story and numbers, and the command around it, on the tiny pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from fisedit_compiler import cli, models
from fisedit_compiler.pipelines import Editor
from fisedit_compiler.pipelines.demo import run_demo, save_pictures


def test_demo_compares_three_kinds_of_edit(pinned_editor: Editor, tmp_path: Path) -> None:
    drawn, automatic, second = run_demo(pinned_editor, seed=1, steps=6)
    assert drawn.edit.report.mask_source == "user"
    assert automatic.edit.report.mask_source == "early-difference"
    assert second.edit.base is automatic.edit
    assert drawn.psnr_to_base_outside > 0
    assert drawn.speedup is not None
    assert all(comparison.edit.unchanged_outside for comparison in (drawn, automatic, second))
    paths = save_pictures([drawn, automatic, second], tmp_path / "new" / "folder")
    assert len(paths) == 1 + 3 * 3 + 1
    assert Image.open(paths[-1]).height > 3 * 256


@pytest.mark.parametrize("schedule", [("--steps", "6"), ("--steps", "1", "--guidance", "0")], ids=" ".join)
def test_demo_command_prints_one_table(
    tiny_pipe: Any, pinned_editor: Editor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: tuple[str, ...]
) -> None:
    monkeypatch.setattr(models, "load_pipeline", lambda model, device: tiny_pipe)
    result = CliRunner().invoke(
        cli.app,
        ["demo", "--output", str(tmp_path), *schedule, "--seed", "1", "--no-progress"],
        env={"COLUMNS": "160"},
    )
    assert result.exit_code == 0, result.output
    assert result.output.count("ratio") == 1 and "recorded on the way" in result.output
    assert result.output.count("yes") == 3
    assert "automatic mask: the prompt changes the whole picture: run densely" in result.output
    assert (tmp_path / "sheet.png").exists()
