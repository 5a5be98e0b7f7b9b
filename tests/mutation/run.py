"""Plants every bug of ``planted.py``, one at a time, and runs the tests named for its file.

    python -m tests.mutation.run                    all of them, a quarter of an hour on one core
    python -m tests.mutation.run --only runtime/    those of some files
    python -m tests.mutation.run --json FILE        the table as JSON, too

The working tree is never written to: package and tests are copied to a temporary folder. A bug survives if its tests
pass all the same; then one of them has to be written. Exit code 1 if any survived.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.mutation.planted import BUGS, Bug

REPOSITORY = Path(__file__).resolve().parents[2]
_COPIED = ("fisedit_compiler", "tests", "benchmarks", "examples", "docs", "pyproject.toml", "README.md", "CHANGELOG.md")
_DATA = Path("fisedit_compiler/models/data")


def copy_repository(folder: Path) -> None:
    """Package, tests and documents in ``folder``; the embedded models stay where they are."""
    for name in _COPIED:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", _DATA.name))
        else:
            shutil.copy(source, folder / name)
    (folder / _DATA).symlink_to(REPOSITORY / _DATA, target_is_directory=True)


def planted(text: str, bug: Bug) -> str:
    """The file's text with the bug in it.

    Raises:
        ValueError: what it replaces does not stand there exactly once.
    """
    if text.count(bug.line) != 1:
        raise ValueError(f"{bug.file}: {bug.line!r} stands there {text.count(bug.line)} times")
    return text.replace(bug.line, bug.planted)


def passes(folder: Path, tests: tuple[str, ...]) -> bool:
    """Whether tests pass in ``folder``."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--show-capture=no", *tests]
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False).returncode == 0


def judge(folder: Path, bugs: list[Bug], console: Console) -> list[dict[str, Any]]:
    """One row a bug: ``killed``, ``survived``, or ``broken`` where its tests fail without it."""
    sound: dict[tuple[str, ...], bool] = {}
    rows = []
    for bug in bugs:
        began = time.perf_counter()
        if bug.tests not in sound:
            sound[bug.tests] = passes(folder, bug.tests)
        file = folder / "fisedit_compiler" / bug.file
        text = file.read_text()
        try:
            file.write_text(planted(text, bug))
            outcome = "broken" if not sound[bug.tests] else "survived" if passes(folder, bug.tests) else "killed"
        finally:
            file.write_text(text)
        rows.append(
            {
                "file": bug.file, "harm": bug.harm, "outcome": outcome, "tests": list(bug.tests),
                "seconds": round(time.perf_counter() - began, 1),
            }
        )  # fmt: skip
        console.print(f"{outcome:9} {rows[-1]['seconds']:6.1f} s  {bug.file}: {bug.harm}", markup=False)
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", default="", help="files that begin like this, such as runtime/")
    parser.add_argument("--json", type=Path, help="write the table here as well")
    options = parser.parse_args(arguments)
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        copy_repository(Path(name))
        rows = judge(Path(name), [bug for bug in BUGS if bug.file.startswith(options.only)], console)
    table = Table("room", "planted", "killed")
    rooms = [row["file"].partition("/")[0] for row in rows]
    for room in dict.fromkeys(rooms):
        outcomes = [row["outcome"] for row, of in zip(rows, rooms, strict=True) if of == room]
        table.add_row(room, str(len(outcomes)), str(outcomes.count("killed")))
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if rows and all(row["outcome"] == "killed" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
