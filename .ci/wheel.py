"""Build wheel and source distribution; run the wheel alone, in an empty environment outside of the checkout.

Run by ``make wheel``. Fails if the source distribution lacks a file that the tests need, if the wheel's metadata and
files do not suffice for ``fisedit demo``, or if a module needs a package that only an extra installs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = (
    "LICENSE", "NOTICE", "README.md", "CHANGELOG.md", "Makefile", "constraints.txt", "pyproject.toml", "mkdocs.yml",
    ".ci/run", "fisedit_compiler", "tests", "benchmarks", "docs", "examples",
)  # fmt: skip
"""Of the source distribution. Of a folder every file that git knows."""

IMPORT_EVERYTHING = """
import importlib, importlib.metadata as metadata, pkgutil, re
import fisedit_compiler
from packaging.requirements import Requirement

assert "site-packages" in fisedit_compiler.__file__, fisedit_compiler.__file__
wanted = [Requirement(text) for text in metadata.requires("fisedit-compiler")]
extras = {item.name for item in wanted if item.marker and "extra" in str(item.marker)}
installed = {re.sub("[-_.]+", "-", item.name.lower()) for item in metadata.distributions()}
assert not extras & installed, f"a dependency installs what only an extra should: {extras & installed}"
modules = [item.name for item in pkgutil.walk_packages(fisedit_compiler.__path__, "fisedit_compiler.")]
for name in modules:
    importlib.import_module(name)
print(f"{len(modules)} modules imported without {', '.join(sorted(extras))}")
"""


def main() -> None:
    """Build, look inside, install, run."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        timed("build", sys.executable, "-m", "build", "--outdir", str(ROOT / "dist"), str(ROOT), quiet=True)
        (wheel,) = newest(".whl")
        (source,) = newest(".tar.gz")
        check_source(source)
        python = place / "environment" / "bin" / "python"
        timed("environment", sys.executable, "-m", "venv", "--without-pip", str(python.parents[1]))
        # Bytecode of all of torch takes longer to compile than the demo uses it.
        install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-compile"]
        install += ["--disable-pip-version-check", "-c", str(ROOT / "constraints.txt")]
        timed("install torch", *install, "torch", quiet=True)
        timed("install the wheel", *install, str(wheel), quiet=True)
        timed("imports", str(python), "-c", IMPORT_EVERYTHING, cwd=place)
        timed(
            "demo", str(python.with_name("fisedit")), "demo", "--steps", "6", "--output", "out", cwd=place, quiet=True
        )
        if not list((place / "out").glob("*.png")):
            sys.exit("the demo left no pictures")


def newest(suffix: str) -> list[Path]:
    """The file with a suffix that was built last, as a list of one."""
    return sorted((ROOT / "dist").glob(f"*{suffix}"), key=lambda file: file.stat().st_mtime)[-1:]


def check_source(archive: Path) -> None:
    """Compare the source distribution with what git knows."""
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    known = subprocess.run(["git", "ls-files", *NEEDED], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    missing = [name for name in known.splitlines() if name not in held and (ROOT / name).exists()]
    if missing:
        sys.exit(f"{archive.name} lacks {len(missing)} files, such as {', '.join(missing[:5])}; see MANIFEST.in")
    print(f"{archive.name} holds {len(held)} files and folders", flush=True)


def timed(what: str, *command: str, cwd: Path | None = None, quiet: bool = False) -> None:
    """Run a command that must succeed, away from the checkout's settings, and say how long it took."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    if cwd is not None:
        environment["FISEDIT_CACHE_DIR"] = str(cwd / "cache")
    started = time.perf_counter()
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if quiet else {}
    done = subprocess.run(command, cwd=cwd, env=environment, text=True, **output)
    if done.returncode:
        print(done.stdout or "", flush=True)
        sys.exit(f"{what} failed")
    print(f"{what}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
