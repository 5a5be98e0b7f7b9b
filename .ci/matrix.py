"""A few test files on the oldest and newest supported Python and torch: ``make matrix``, an environment per cell.

A cell that this machine or its package index cannot make is named with the reason and is no failure; a failing test is.
``MATRIX="3.13-2.13 ..."`` picks cells. Environments stay in ``.venv-matrix/`` for the next run; where the index has
torch only as a CUDA build, one takes several gigabytes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.13")
TORCHES = ("2.11", "2.13")
FILES = (
    "tests/masks/test_shapes.py",
    "tests/kernels/test_conv2d_sites.py",
    "tests/kernels/test_registration.py",
    "tests/passes/rewrites/test_convolution_pass.py",
    "tests/graph/test_layout.py",
    "tests/pages/test_pages.py",
    "tests/capture/cache/test_cache_files.py",
)
"""Each uses another part of torch: operations, ``torch.library``, export and fx, serialisation."""
SPECIFIC = ("torch", "triton", "setuptools")
"""Lines of constraints.txt that a cell does without: each torch asks for its own."""


class CannotMake(Exception):
    """Why a cell cannot be made here."""


def main() -> None:
    """Run the cells, say what became of each, fail if a test did."""
    cells = [f"{python}-{torch}" for python in PYTHONS for torch in TORCHES]
    outcomes = {}
    for cell in os.environ.get("MATRIX", "").split() or cells:
        python, _, torch = cell.partition("-")
        started = time.perf_counter()
        try:
            environment = make(python, torch)
            made = time.perf_counter() - started
            code = subprocess.run([environment, "-m", "pytest", "-n", "0", *FILES], cwd=ROOT).returncode
            spent = time.perf_counter() - started - made
            outcomes[cell] = f"{'FAILED' if code else 'passed'} ({made:.0f} s to make, {spent:.0f} s of tests)"
        except CannotMake as reason:
            outcomes[cell] = f"not made: {reason}"
        print(f"Python {python}, torch {torch}: {outcomes[cell]}", flush=True)
    print("\n" + "\n".join(f"{cell}: {outcome}" for cell, outcome in outcomes.items()))
    sys.exit(any("FAILED" in outcome for outcome in outcomes.values()))


def make(python: str, torch: str) -> Path:
    """The interpreter of a cell's environment, made anew unless it stands already."""
    folder = ROOT / ".venv-matrix" / f"{python}-{torch}"
    interpreter = folder / "bin" / "python"
    done = folder / ".installed"
    wanted = [ROOT / "pyproject.toml", ROOT / "constraints.txt"]
    if done.exists() and all(done.stat().st_mtime > file.stat().st_mtime for file in wanted):
        return interpreter
    base = find(python)
    with tempfile.TemporaryDirectory() as place:
        constraints = Path(place) / "constraints.txt"
        lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        constraints.write_text("\n".join(line for line in lines if line.partition("==")[0] not in SPECIFIC))
        install = ["install", "--quiet", "--disable-pip-version-check", "--no-compile", "-c", str(constraints)]
        must([base, "-m", "venv", "--clear", str(folder)], "no environment")
        must([interpreter, "-m", "pip", *install[:-2], "--upgrade", "pip"], "no newer pip")
        pip = [interpreter, "-m", "pip", *install, f"torch=={torch}.*"]
        must(pip, f"no torch {torch} for it")
        must([*pip, "-e", f"{ROOT}[test]"], "its packages do not install")
    done.touch()
    return interpreter


def find(version: str) -> Path:
    """A Python of a version: on the path, of pyenv, or of uv."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [shutil.which(f"python{version}"), *root.glob(f"versions/{version}.*/bin/python")]
    if uv := shutil.which("uv"):
        found.append(subprocess.run([uv, "python", "find", version], capture_output=True, text=True).stdout.strip())
    for candidate in filter(None, found):
        told = subprocess.run([candidate, "-c", "import sys, ensurepip; print('%d.%d' % sys.version_info[:2])"],
                              capture_output=True, text=True)  # fmt: skip
        if told.stdout.strip() == version:
            return Path(candidate)
    raise CannotMake(f"no Python {version} on the path, in pyenv or in uv")


def must(command: list[str | Path], failure: str) -> None:
    """Run a command; its errors are the reason that a cell cannot be made."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.startswith(("ERROR", "    "))]
        raise CannotMake(f"{failure}: {'; '.join(lines[:4]) or f'exit code {done.returncode}'}")


if __name__ == "__main__":
    main()
