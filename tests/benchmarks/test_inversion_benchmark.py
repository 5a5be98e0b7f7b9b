"""The benchmark of loaded pictures on the tiny pipeline: its rows, its sheets, and that it drives every method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import inversion
from fisedit_compiler.pipelines import Editor


def test_a_row_for_every_picture_and_method(
    tiny_pipe: Any, pinned_editor: Editor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inversion, "load_pipeline", lambda: tiny_pipe)
    monkeypatch.setattr(inversion, "RENDER_STEPS", 2)
    path = tmp_path / "rows.json"
    inversion.main(
        ["--steps", "3", "--pictures", "cat", "drawn-apple", "--json", str(path), "--pictures-folder", str(tmp_path)]
    )
    report = json.loads(path.read_text())
    assert [(row["picture"], row["method"]) for row in report["rows"]] == [
        (picture, method) for picture in ("cat", "drawn-apple") for method in inversion.METHODS
    ]
    assert all(row["outside_is_the_picture"] for row in report["rows"])
    assert all(row["free_psnr"] > 0 and row["corrected_psnr"] > 0 for row in report["rows"])
    assert Image.open(tmp_path / "cat.png").width > 4 * 256


def test_the_committed_figures_are_those_of_the_page() -> None:
    root = Path(__file__).resolve().parents[2]
    page = (root / "docs" / "inversion.md").read_text(encoding="utf-8")
    rows = json.loads((root / "benchmarks" / "results" / "cpu_inversion.json").read_text())["rows"]
    for ddim, friendly in zip(rows[::2], rows[1::2], strict=True):
        assert f"| {ddim['free_psnr']:.1f} | {friendly['free_psnr']:.1f} | {ddim['corrected_psnr']:.1f} |" in page
        assert f"| {ddim['preference']:+.2f} | {friendly['preference']:+.2f} |" in page
