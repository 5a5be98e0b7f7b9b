"""The shape of the repository: no circle of imports, no long file, no crowded room, and tests where their subject is.

Which room may import from which is checked by ``lint-imports`` (``pyproject.toml``). That every room's docstring says
the same is checked here.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]
LONGEST_FILE = 400
"""Lines."""
FULLEST_ROOM = 15
"""Files, in a folder without folders."""
CROWDED = frozenset({"fisedit_compiler/kernels", "fisedit_compiler/passes/rewrites", "tests/passes/rewrites"})
"""Rooms of many alike files: one op, or one kind of operation, each."""
WITHOUT_A_ROOM = frozenset(
    {"benchmarks", "contracts", "documents", "fuzz", "mutation", "reference", "replay", "structure", "support"}
)
"""Folders of tests that are about more than one room."""


def sources() -> list[Path]:
    return [
        path.relative_to(ROOT)
        for folder in ("fisedit_compiler", "benchmarks", "tests", "examples", "docs")
        for path in (ROOT / folder).rglob("*.py")
    ]


@pytest.mark.parametrize(
    "init", sorted((ROOT / "fisedit_compiler").rglob("*/__init__.py")), ids=lambda path: path.parent.name
)
def test_a_room_says_what_it_may_import(init: Path) -> None:
    """The rooms right below it, none but those and its like. A room in a room names its owner."""
    (said,) = re.findall(
        r"May\s+import\s+(.*?)\.(?:\s|$)", ast.get_docstring(ast.parse(init.read_text())) or "", re.DOTALL
    )
    named = set(re.findall(r"``(\w+)``", said))
    *owners, room = init.parent.relative_to(ROOT / "fisedit_compiler").parts
    if owners:
        assert named == set(owners)
        return
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    names = [set(re.findall(r"\w+", layer)) for layer in layers]
    (own,) = (number for number, rooms in enumerate(names) if room in rooms)
    alike = names[own] if ":" in layers[own] else set()
    assert names[own + 1] <= named <= names[own + 1] | alike - {room}


@pytest.mark.parametrize("package", ["fisedit_compiler", "benchmarks"])
def test_no_files_import_each_other(package: str) -> None:
    graph = grimp.build_graph(package, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(error.args[1]))


def test_no_file_is_too_long() -> None:
    lines = {str(path): len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in sources()}
    assert not {path: count for path, count in lines.items() if count > LONGEST_FILE}


def test_every_room_is_a_package() -> None:
    """Else the wheel lacks it, and neither ``lint-imports`` nor the test of circles sees what it imports."""
    rooms = {ROOT / path.parent for path in sources() if path.parts[0] == "fisedit_compiler"}
    assert not {str(room.relative_to(ROOT)) for room in rooms if not (room / "__init__.py").is_file()}


def test_no_room_is_crowded() -> None:
    rooms = Counter(str(path.parent) for path in sources())
    with_rooms = {str(Path(room).parent) for room in rooms}
    crowded = {room: count for room, count in rooms.items() if count > FULLEST_ROOM and room not in with_rooms}
    assert not crowded.keys() - CROWDED


def test_tests_mirror_the_package() -> None:
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    package = ROOT / "fisedit_compiler"
    rooms = {path.name.removesuffix(".py") for path in package.iterdir() if path.name[0] not in "_."}
    assert not folders - rooms - WITHOUT_A_ROOM
