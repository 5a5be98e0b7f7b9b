"""What the command ``fisedit eval`` does: make pairs, or run them with a progress bar and write the report."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from fisedit_compiler.errors import ConfigError, FiseditError
from fisedit_compiler.evaluation.pages import tables
from fisedit_compiler.evaluation.pages.document import document
from fisedit_compiler.evaluation.pages.report import build_report
from fisedit_compiler.evaluation.pairs.grammar import make_pairs
from fisedit_compiler.evaluation.pairs.pairs import EditPair, PairFile, write_pairs
from fisedit_compiler.evaluation.results.aggregate import aggregate
from fisedit_compiler.evaluation.results.store import Store
from fisedit_compiler.evaluation.runner import Evaluation, Progress, evaluate

PROBLEMS_SHOWN = 20
_SHARD = re.compile(r"([0-9]{1,9})/([0-9]{1,9})")


@dataclass(frozen=True)
class Ending:
    """How a command ended.

    Attributes:
        results: contents of ``results.json``.
        failed: pairs that failed in this run.
    """

    results: dict[str, Any]
    failed: int


def make_pairs_file(path: Path, count: int, seed: int) -> str:
    """Write ``count`` pairs and return what was done, as a sentence.

    Raises:
        ConfigError: ``count`` is below 1.
        FiseditError: the file is there already, or cannot be written.
    """
    if path.exists():
        raise FiseditError(f"{str(path)!r} is there already; name another file, or delete it")
    pairs = make_pairs(count, seed)
    write_pairs(pairs, path)
    kinds: dict[str, int] = {}
    for pair in pairs:
        kinds[str(pair.kind)] = kinds.get(str(pair.kind), 0) + 1
    return f"wrote {count} pairs to {path}: " + ", ".join(f"{number} {kind}" for kind, number in kinds.items())


def parse_shard(text: str) -> tuple[int, int]:
    """``"2/8"`` as ``(2, 8)``.

    Raises:
        ConfigError: it is not of that form, or out of range.
    """
    match = _SHARD.fullmatch(text)
    number, shards = (int(part) for part in match.groups()) if match else (0, 0)
    if not 1 <= number <= shards:
        raise ConfigError(f"--shard {text[:40]!r} must be i/n with i from 1 to n, as in 1/4 to 4/4")
    return number, shards


def run_evaluation(evaluation: Evaluation, console: Console, *, fresh: bool = False, progress: bool = True) -> Ending:
    """Run the pairs, then write ``results.json``, ``report.html`` and ``quality.md``.

    Raises:
        ConfigError: the folder holds results of another configuration, or ``fresh`` was asked for with a shard.
        FiseditError: see :func:`~fisedit_compiler.evaluation.runner.evaluate`.
    """
    if fresh:
        if evaluation.shard[1] > 1:
            raise ConfigError("--fresh would delete what other shards write; delete the folder before you start them")
        Store(evaluation.output).clear()
    failures: list[str] = []
    with _bars(console, progress, failures) as callbacks:
        file = evaluate(evaluation, callbacks)
    _print_problems(file, console)
    for line in failures[:PROBLEMS_SHOWN]:
        console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
    return Ending(write_report(evaluation.output), len(failures))


def write_report(output: Path) -> dict[str, Any]:
    """Write results, page and document of what is in the folder so far; returns the results.

    Raises:
        FiseditError: the folder holds no evaluation.
    """
    store = Store(output)
    results = aggregate(store)
    store.write_text("results.json", json.dumps(results, indent=1))
    store.write_text("report.html", build_report(store, results))
    store.write_text("quality.md", document([results], "fisedit eval --report-only --output " + output.name))
    return results


def summary_table(results: dict[str, Any]) -> Table:
    """The figures that matter most, for the terminal."""
    columns = {
        "directional\nsimilarity": ("directional_similarity", "mean", "{:.3f}"),
        "image\nsimilarity": ("image_similarity", "mean", "{:.3f}"),
        "dB outside\nthe mask": ("psnr_outside_mask", "mean", "{:.1f}"),
        "mask\n(median)": ("mask_area", "median", "{:.1%}"),
        "s an edit\n(median)": ("seconds", "median", "{:.2f}"),
    }
    table = Table(title=f"{results['counts']['done']} pairs: means and medians; report.html has the intervals")
    table.add_column("method")
    for heading in ("pairs", *columns):
        table.add_column(heading, justify="right")
    for method in results["methods"]:
        figures = method["groups"].get("all", {"pairs": 0})
        cells = [
            form.format(figures[name][which]) if name in figures else "-" for name, which, form in columns.values()
        ]
        table.add_row(escape(method["name"]), str(figures["pairs"]), *cells)
    return table


def check_lines(results: dict[str, Any]) -> Iterator[str]:
    """What must hold, a line each."""
    for question, limit, value, answer, pairs, detail in tables.check_table(results).rows:
        yield f"{answer:>8}  {question}: {value} (limit {limit}, {pairs} pairs{'; ' + detail if detail else ''})"


def _print_problems(file: PairFile, console: Console) -> None:
    problems = file.problems()
    for line in problems[:PROBLEMS_SHOWN]:
        console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
    if len(problems) > PROBLEMS_SHOWN:
        console.print(f"and {len(problems) - PROBLEMS_SHOWN} more lines", style="yellow", highlight=False)


@contextmanager
def _bars(console: Console, enabled: bool, failures: list[str]) -> Iterator[Progress]:
    """A bar over the pairs, and one over the methods of the pair that is running."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, disable=not enabled) as bar:
        pairs: TaskID = bar.add_task("pairs", total=None)
        steps: TaskID = bar.add_task("", total=None)

        def total(count: int, methods: int) -> None:
            bar.update(pairs, total=count)
            bar.update(steps, total=methods + 1)

        def finished(pair: EditPair, error: str) -> None:
            bar.advance(pairs)
            if error:
                failures.append(f"line {pair.line} failed: {error}")

        yield Progress(
            total=total,
            pair=lambda pair: bar.update(steps, completed=0),
            method=lambda name: bar.update(steps, description=name, advance=1),
            finished=finished,
        )
