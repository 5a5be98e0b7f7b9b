"""Names of modules, attributes and files of the package, in the pages and in docstrings: each exists.

A name counts wherever it begins with a folder of the repository (``fisedit_compiler.masks``, ``docs/masks.md``). In
quotes it also counts if it begins with a folder of the package, as a dotted name (``masks.to_site_mask``) or as a path
(``graph/inputs.py``). In a docstring it may also begin with a folder of the module's own room (``editing.batch`` in
``pipelines/``). Names of single files such as ``config`` are names of variables, too, and do not count.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fisedit_compiler"
FOLDERS = ("fisedit_compiler", "tests", "benchmarks", "docs", "examples")
"""Folders of the repository that names may begin with."""
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/NOTES.md", *sorted(ROOT.glob("docs/*.md"))]
FILES = (".json", ".jsonl", ".py", ".txt")
"""How files end that may be called like a folder."""
ALSO = {"graph": torch.fx.Graph}
"""Rooms that are called like a variable of a class of torch."""

_QUOTED = re.compile(r"``((?:[^`\n]|\n(?!\n))+)``|`~?((?:[^`\n]|\n(?!\n))+)`")
"""In a page between single backticks; in a docstring between two, or between single ones as a role."""
_NAME = re.compile(r"(?<![\w./\-\[])[A-Za-z_]\w*(?:\.[A-Za-z_]\w*|/\w[\w-]*)+")
_FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_what_there_is(page: Path) -> None:
    assert wrong_names(page.read_text(encoding="utf-8"), page.parent) == []


def test_docstrings_name_what_there_is() -> None:
    wrong = {
        f"{file.relative_to(ROOT)}:{line}": names
        for folder in FOLDERS
        for file in sorted((ROOT / folder).rglob("*.py"))
        for line, text in docstrings(file)
        if (names := wrong_names(text, file.parent))
    }
    assert wrong == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_import_what_there_is(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fisedit_compiler"):
                for alias in node.names:
                    assert resolves(f"{node.module}.{alias.name}"), f"{node.module} has no {alias.name}"


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("`masks.to_site_mask(x)` and `fisedit_compiler.masks`", []),
        ("`pipelines.words.token_columns`", ["pipelines.words.token_columns"]),
        ("`pipelines.drawing.mask_overlay`", ["pipelines.drawing.mask_overlay"]),
        ("python -m fisedit_compiler.evaluation.document, outside of quotes", ["fisedit_compiler.evaluation.document"]),
        ("`graph/inputs.py`, `geometry/block_costs.json`, `recordings/stores/`", []),
        ("`runtime/stores.py` and `tests/graph/test_gone.py`", ["runtime/stores.py", "tests/graph/test_gone.py"]),
        ("`pipelines.Edit.report` and `pipelines.Edit.cost`", ["pipelines.Edit.cost"]),
        ("`graph.lint()`, `graph.layout.Layout`, `graph.gone`", ["graph.gone"]),
        ("`config.cache`, `module.half()`, `compiled.edit(masks)`, `torch.fx.graph.Gone`, `results.json`", []),
    ],
)
def test_names_that_are_wrong_are_found(text: str, wrong: list[str]) -> None:
    assert wrong_names(text, ROOT) == wrong


def test_folders_of_the_own_room_may_begin_a_name() -> None:
    text = "``editing.batch`` runs, ``editing.gone`` does not, and ``sessions.modes`` is of another room."
    assert wrong_names(text, PACKAGE / "pipelines") == ["editing.gone"]
    assert wrong_names("``support/graph_stand_in.py``", ROOT / "tests/inspect") == []


def wrong_names(text: str, folder: Path) -> list[str]:
    """The names in a text that stand for nothing. ``folder`` is where the text is."""
    quoted = [name for quotes in _QUOTED.findall(_FENCED.sub("", text)) for name in _NAME.findall("".join(quotes))]
    found = [name for name in _NAME.findall(text) if first_of(name) in FOLDERS]
    return [name for name in dict.fromkeys(quoted + found) if not exists(name, folder)]


def first_of(name: str) -> str:
    return re.split(r"[./]", name)[0]


def exists(name: str, folder: Path) -> bool:
    """Whether a name stands for something, or is none of the package."""
    first = first_of(name)
    own = [PACKAGE, *(parent for parent in (folder, *folder.parents) if ROOT in parent.parents)]
    places = [place for place in own if (place / first / "__init__.py").exists()]
    if "/" in name:
        places = [place for place in own if (place / first).is_dir()]
        places += [ROOT] * (first in FOLDERS)
        return not places or any((place / name).exists() for place in places)
    if first in FOLDERS:
        return resolves(name)
    if not places or (name.count(".") == 1 and name.endswith(FILES)):
        return True
    if first in ALSO and hasattr(ALSO[first], name.split(".")[1]):
        return True
    return any(resolves(".".join((*place.relative_to(ROOT).parts, name))) for place in places)


def resolves(name: str) -> bool:
    """Whether a dotted name is a module of the repository, or an attribute in one."""
    parts = name.split(".")
    length = max((n for n in range(1, len(parts) + 1) if is_module(parts[:n])), default=0)
    if not length or length == len(parts) or parts[0] != PACKAGE.name:
        return bool(length)
    value = importlib.import_module(".".join(parts[:length]))
    for part in parts[length:]:
        if is_dataclass(value) and part in {field.name for field in fields(value)}:
            return True
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True


def is_module(parts: list[str]) -> bool:
    path = ROOT.joinpath(*parts)
    return path.is_dir() or path.with_suffix(".py").exists()


def docstrings(file: Path) -> Iterator[tuple[int, str]]:
    """Every string of a file that is a statement of its own, with its line."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value
