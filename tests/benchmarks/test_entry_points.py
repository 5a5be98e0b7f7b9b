"""Every way to edit that the documents show is timed as it comes, and a way that fails costs no other one its row."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import entry_points
from benchmarks.support import pipelines
from benchmarks.support.ways import WAYS, Way
from fisedit_compiler.module import SparseModule
from fisedit_compiler.pipelines import Editor
from fisedit_compiler.pipelines.parts import PartsInUse
from tests.support.tiny_pipeline import make_tiny_pipeline

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ("README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))))
TINY = ["--size", "64", "--steps", "2", "--repeats", "1", "--dense-form", "none", "--fraction", "0.1"]

MAKES = {
    "fisedit_compiler.Editor": "Editor",
    "fisedit_compiler.sparsify": "SparseModule",
    "fisedit_compiler.pipelines.parts.use": "PartsInUse",
}
"""Classes of what calls return, as far as their methods are public ways."""
BEFORE = {"editor": "Editor", "compiled": "SparseModule", "base": "Editor.generate"}
"""What names stand for in a block that leaves out where they come from."""
NO_EDITS = {
    *MAKES,
    "Editor.generate",
    "Editor.load",
    "PartsInUse.record",
    "SparseModule.record",
    "SparseModule.stages",
    "fisedit_compiler.dynamo.record",
    "fisedit_compiler.masks.ellipse_mask",
    "fisedit_compiler.models.load_pipeline",
    "fisedit_compiler.pipelines.DetectedMask",
    "fisedit_compiler.pipelines.register_mask_detector",
    'torch.compile(backend="fisedit")',
}
"""What the documents call that edits nothing by itself."""


class Calls(ast.NodeVisitor):
    """The calls of this package in the Python of a document, by what is called; edits also by what of and where.

    Names keep their meaning from block to block.
    """

    def __init__(self) -> None:
        self.meanings = dict(BEFORE)
        self.found: list[str] = []

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self.meanings |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}

    def visit_Import(self, node: ast.Import) -> None:
        self.meanings |= {alias.asname or alias.name: alias.name for alias in node.names}

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        self._means(node.targets, node.value)

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            self.visit(item.context_expr)
            self._means([item.optional_vars], item.context_expr)
        for statement in node.body:
            self.visit(statement)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        name = self._called(node)
        first, *others = name.partition("(")[0].split(".")
        # What hangs from an edit, such as its picture, is no way in.
        if "fisedit" in name or (first in MAKES.values() and len(others) == 1):
            self.found.append(name)

    def _means(self, targets: list[Any], value: ast.expr) -> None:
        meaning = self._called(value).partition("(")[0] if isinstance(value, ast.Call) else None
        for target in targets:
            if isinstance(target, ast.Name) and meaning is not None:
                self.meanings[target.id] = MAKES.get(meaning, meaning)

    def _called(self, node: ast.Call) -> str:
        name = self._name(node.func)
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if name == "torch.compile" and isinstance(backend := given.get("backend"), ast.Constant):
            return f'torch.compile(backend="{backend.value}")'
        if name != "Editor.edit":
            return name
        base = self._name(node.args[0])
        mask = given.get("mask")
        is_found = isinstance(mask, ast.Constant) or not given.keys() & {"mask", "box", "polygon"}
        drawn = "" if is_found or base != "Editor.generate" else ", mask"
        return f"Editor.edit({base}{drawn})"

    def _name(self, node: ast.expr) -> str:
        """Names joined by dots, the first one by what it stands for; empty if it stands for nothing that is known."""
        names = []
        while isinstance(node, ast.Attribute):
            names.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name) or node.id not in self.meanings:
            return ""
        return ".".join([self.meanings[node.id], *reversed(names)])


def shown_in(text: str) -> list[str]:
    """What the Python of a document calls."""
    calls = Calls()
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        calls.visit(ast.parse(block))
    return calls.found


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_the_documents_show_has_a_row(document: str):
    found = set(shown_in((ROOT / document).read_text(encoding="utf-8")))
    unknown = found - NO_EDITS - {way.shown for way in WAYS.values()}
    assert not unknown, (
        f"{document} shows {sorted(unknown)}: give each a way in benchmarks/support/ways.py, or name it in NO_EDITS "
        "if it edits nothing"
    )


def test_every_way_is_one_that_the_documents_show():
    found = {call for document in DOCUMENTS for call in shown_in((ROOT / document).read_text(encoding="utf-8"))}
    assert {way.shown for way in WAYS.values()} <= found
    assert found >= NO_EDITS, "of what edits nothing, too, only what is shown is named"


def test_every_public_edit_has_a_row():
    timed = {way.shown.partition("(")[0] for way in WAYS.values()}
    for owner in (Editor, SparseModule, PartsInUse):
        assert {f"{owner.__name__}.{name}" for name in vars(owner) if name.startswith("edit")} <= timed


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ("with Editor(pipe) as e:\n    e.paint(base)", "Editor.paint"),
        ("from fisedit_compiler import brush\nbrush(pipe, mask)", "fisedit_compiler.brush"),
        ("import fisedit_compiler\nmine = fisedit_compiler.sparsify(unet)\nmine.redraw()", "SparseModule.redraw"),
        ("editor.edit(editor.load(picture), prompt)", "Editor.edit()"),
    ],
)
def test_a_way_without_a_row_is_noticed(block: str, expected: str):
    before = "from fisedit_compiler import Editor\n"
    found = set(shown_in(f"```python\n{before}{block}\n```"))
    assert expected in found - NO_EDITS - {way.shown for way in WAYS.values()}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Any:
    pipe = make_tiny_pipeline()
    monkeypatch.setattr(pipelines, "load", lambda *_: pipe)
    return pipe


def test_every_way_has_a_row_and_keeps_what_lies_outside(tiny: Any, tmp_path: Path):
    path, unet, vae = tmp_path / "rows.json", tiny.unet, tiny.vae
    entry_points.main([*TINY, "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert [row["way"] for row in rows] == list(WAYS)
    for row in rows:
        assert row["baseline"] == "eager" and row["unchanged_outside"], row["way"]
        assert row["ratio"] == pytest.approx(row["baseline_ms"] / row["edit_ms"], rel=0.01)
        assert row["base_s"] > 0 and row["first_edit_s"] > 0
        assert sum(row["calls"].values()) == 2
        if row["way"] != "edit-found":
            assert row["slow"] == [] and row["mask_fraction"] == pytest.approx(0.1, abs=0.03)
            assert not set(row["calls"]) - {"sparse", "shallow"}
    assert tiny.unet is unet and tiny.vae is vae


def test_what_makes_an_edit_slow_is_said(tiny: Any):
    (row,) = entry_points.main([*TINY, "--ways", "sparsify", "--fraction", "0.9"]).rows
    assert row["calls"] == {"dense": 2} and "break-even" in row["slow"][0]


def test_a_way_that_fails_costs_no_other_row(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    def fails(runs: Any, mask: torch.Tensor) -> Any:
        runs.pipe.unet = None
        raise RuntimeError("no way in")

    monkeypatch.setitem(WAYS, "parts", Way("", "", fails))
    path, unet = tmp_path / "rows.json", tiny.unet
    with pytest.raises(SystemExit, match="emoji-scenes parts"):
        entry_points.main([*TINY, "--ways", "parts", "edit", "--json", str(path)])
    assert [row["way"] for row in json.loads(path.read_text())["rows"]] == ["edit"]
    assert "no way in" in capsys.readouterr().err
    assert tiny.unet is unet
