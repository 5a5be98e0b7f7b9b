"""The page of results over commits: what ``benchmarks/results/`` held at every commit that changed it.

MkDocs runs ``on_files`` (``hooks:`` in ``mkdocs.yml``). Where there is no git, or no history, the page shows the files
as they are.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]
RESULTS = Path("benchmarks/results")
HEAD = """# Results over commits

Every file of `benchmarks/results/` with rows, and what it said at each commit that changed it. Ratios compare what was
timed in turn on one machine. Milliseconds and seconds of two columns compare only where the machine is the same. What
the figures mean is in the [notes on measurements](measurements.md), and quality has [a page of its own](quality.md).
"""
MOST_ROWS = 40
"""Of a file that is shown; a file with more holds what another page sums up."""
_APART = ("iqr", "spread", "requested", "error")
"""In names of numbers that say how sure another one is, or what was asked for."""


@dataclass(frozen=True)
class Version:
    """One result as a commit left it.

    Attributes:
        when: date and short hash of the commit; ``now`` without one.
        result: the JSON object.
    """

    when: str
    result: Mapping[str, Any]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "results.md", content=results_page()))
    return files


def results_page(root: Path = ROOT) -> str:
    """The page in Markdown."""
    parts = [HEAD]
    for path in sorted((root / RESULTS).glob("*.json")):
        versions = list(history(path, root))
        if versions and len(versions[-1].result["rows"]) <= MOST_ROWS and (table := table_of(versions)):
            parts.append(f"## {path.name}\n\n{_said_of(versions[-1].result)}\n\n{table}\n")
    return "\n".join(parts)


def history(path: Path, root: Path = ROOT) -> Iterator[Version]:
    """What a file held, oldest first; results that compare two commits themselves give two versions."""
    log = _git(root, "log", "--follow", "--name-only", "--format=%x00%cs %h", "--", str(path.relative_to(root)))
    commits = [entry.split() for entry in log.split("\0") if entry.strip()]
    texts = [(f"{day} {commit}", _git(root, "show", f"{commit}:{name}")) for day, commit, name in reversed(commits)]
    now = path.read_text(encoding="utf-8")
    if not texts or texts[-1][1].strip() != now.strip():
        texts.append(("now", now))
    for when, text in texts:
        result = json.loads(text)
        if "rows" in result:
            yield Version(when, result)
        else:
            yield from (
                Version(f"{when} {name}", part)
                for name, part in result.items()
                if isinstance(part, dict) and "rows" in part
            )


def table_of(versions: list[Version]) -> str:
    """A line for every figure of every row, a column for every version; empty if there is none."""
    lines: dict[tuple[str, str], dict[int, float]] = {}
    for column, version in enumerate(versions):
        for row in version.result["rows"]:
            what = ", ".join(_identity(row)) or "-"
            for name in _figures(row):
                lines.setdefault((what, name), {})[column] = row[name]
    if not lines:
        return ""
    machines = [_machine(version.result) for version in versions]
    head = ["row", "figure", *(f"{version.when}<br>{on}" for version, on in zip(versions, machines, strict=True))]
    body = [
        [what, f"`{name}`", *(_number(values.get(column)) for column in range(len(versions)))]
        for (what, name), values in lines.items()
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body))


def _identity(row: Mapping[str, Any]) -> list[str]:
    """What was measured: the words of a row, its settings, its area."""
    words = [str(value) for name, value in row.items() if isinstance(value, str) and name != "refused"]
    settings = [f"{name} {row[name]}" for name in ("step", "steps", "turns", "record") if name in row]
    area = row.get("requested_fraction", row.get("mask_fraction", row.get("fraction")))
    return [*words, *settings, *([] if area is None else [f"{area:.1%}"])]


def _figures(row: Mapping[str, Any]) -> list[str]:
    """Ratios; times and the like where a row has none; else every number with a fraction."""
    numbers = [
        name
        for name, value in row.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not any(word in name for word in _APART)
    ]
    ratios = [name for name in numbers if "ratio" in name.split("_")]
    measured = [name for name in numbers if name.endswith(("_ms", "_s", "_mib", "_gib", "_psnr"))]
    return ratios or measured or [name for name in numbers if isinstance(row[name], float)]


def _machine(result: Mapping[str, Any]) -> str:
    machine, versions = result.get("machine", {}), result.get("versions", {})
    return f"{machine.get('gpu') or machine.get('cpu', '')}, torch {versions.get('torch', '?')}"


def _said_of(result: Mapping[str, Any]) -> str:
    name = result.get("benchmark")
    return f"`python -m benchmarks.{name}`, the latest with `{json.dumps(result.get('settings', {}))}`."


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _git(root: Path, *arguments: str) -> str:
    """What git prints; nothing where there is no git or no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout
