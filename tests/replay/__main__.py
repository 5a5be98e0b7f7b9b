"""Compare a commit with the working tree: ``python -m replay BASE`` from the root of the repository.

The package of the commit is checked out into a temporary folder, and the working tree's writer and zoo run against it
and against the working tree's own package, each in a process and with a cache of captures of its own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from replay import compare

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Write both commits and compare them; the exit status is that of :mod:`replay.compare`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="the commit to compare with")
    parser.add_argument("--models", nargs="*", default=[], help="of these models only")
    parser.add_argument("--output", type=Path, default=ROOT / "replay-output", help="what was there is removed")
    parser.add_argument("--lines", type=int, default=40, help="lines of a diff that are printed; 0 for all")
    chosen = parser.parse_args(arguments)
    output = chosen.output.resolve()
    for side in ("base", "now"):
        shutil.rmtree(output / side, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="replay-") as scratch, _checked_out(chosen.base, Path(scratch)) as base:
        packages = {"base": base, "now": ROOT}
        running = [
            _start(side, package, output / side, Path(scratch) / f"cache-{side}", chosen.models)
            for side, package in packages.items()
        ]
        try:
            failed = [process.wait() for process in running]
        finally:
            for process in running:
                process.kill()
    if any(failed):
        print("a writer failed, so nothing is compared", file=sys.stderr)
        return 2
    whole = output / "differences.diff"
    status = compare.main(
        [str(output / "base"), str(output / "now"), "--lines", str(chosen.lines), "--diff", str(whole)]
    )
    print(f"whole diffs: {whole}")
    return status


@contextmanager
def _checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """A work tree of a commit, for as long as the block runs."""
    tree = folder / "base"
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(tree), commit], check=True)
    try:
        yield tree
    finally:
        subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def _start(side: str, package: Path, folder: Path, cache: Path, models: Sequence[str]) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(package), str(TESTS)]),
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "FISEDIT_CACHE_DIR": str(cache),
    }
    command = [sys.executable, "-m", "replay.write", str(folder), "--package", str(package), "--label", f"{side} "]
    if models:
        command += ["--models", *models]
    # Python looks for modules in the current folder first, so that is the package's.
    return subprocess.Popen(command, cwd=package, env=environment)


if __name__ == "__main__":
    raise SystemExit(main())
