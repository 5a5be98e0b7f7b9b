"""From which mask area on is a dense call faster? Fits the figures that the package falls back to dense calls by.

Reads reports of ``benchmarks.step_latency``. For every model in them the ratio sparse : dense is interpolated linearly
between the measured areas, and where it passes 1 is that model's break-even; a device and backend gets the median of
its models. Pairs that no report covers keep their figure. Measure with ``--dense-above 1``: rows whose calls fell back
to dense ones say nothing about sparse calls, and are left out.

    python -m benchmarks.break_even benchmarks/results/*.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: make the repository's root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

import fisedit_compiler.geometry.break_even as packaged

PACKAGE_FILE = Path(packaged.__file__).with_name(packaged.FILE)
Point = tuple[float, float]


@dataclass(frozen=True)
class Measured:
    """One model of one report.

    Attributes:
        device: device type of the measurement.
        backend: what the sparse step ran on.
        source: file, model, machine and version of torch, for the reader of the figures.
        points: ``(share of active sites, sparse time : dense time)``.
    """

    device: str
    backend: str
    source: Mapping[str, str]
    points: tuple[Point, ...]


def crossing(points: Sequence[Point]) -> float | None:
    """The area at which sparse : dense passes 1, interpolated linearly between the points.

    Returns:
        The smallest area if sparse calls are slower from there on already, 1.0 if they are no slower on the full area,
        ``None`` if the points end before the ratio passes 1.
    """
    ordered = sorted(points)
    if not ordered:
        return None
    if ordered[0][1] > 1.0:
        return ordered[0][0]
    for (area, ratio), (next_area, next_ratio) in pairwise(ordered):
        if next_ratio > 1.0:
            return area + (1.0 - ratio) / (next_ratio - ratio) * (next_area - area)
    return 1.0 if ordered[-1][0] >= 1.0 else None


def measurements(name: str, report: Mapping[str, Any]) -> list[Measured]:
    """The models of one report of ``step_latency``; none in a report of another benchmark.

    The baseline is what a dense call of the edit runs: compiled code for the full-size models on a GPU, the module
    itself for the embedded one.
    """
    if report.get("benchmark") != "step_latency":
        return []
    settings, machine = report["settings"], report["machine"]
    # Reports older than the setting: full-size models were measured with Inductor, the embedded one never.
    backend = settings.get("backend", "inductor" if "models" in settings else "eager")
    baseline = "compiled" if "models" in settings else "eager"
    by_model: dict[str, list[Point]] = {}
    for row in report["rows"]:
        if row.get("kind", "sparse") != "sparse" or row.get("baseline", baseline) != baseline:
            continue
        dense = row["baseline_ms"] if "baseline_ms" in row else row["dense_ms"]
        points = by_model.setdefault(row.get("model", settings.get("model", "")), [])
        points.append((row["mask_fraction"], row["sparse_ms"] / dense))
    facts = {"machine": machine.get("gpu") or machine["cpu"], "torch": report["versions"]["torch"]}
    return [
        Measured(machine["device"], backend, {"file": name, "model": model, **facts}, tuple(points))
        for model, points in by_model.items()
    ]


def fit(measured: Sequence[Measured], known: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of the package's file: ``known`` with the figures of what was measured in their place."""
    entries = {(entry["device"], entry["backend"]): entry for entry in known["figures"]}
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in measured:
        area = crossing(one.points)
        if area is not None:
            source = {**one.source, "break_even": round(area, 3)}
            found.setdefault((one.device, one.backend), []).append(source)
    for (device, backend), sources in found.items():
        figure = round(statistics.median(source["break_even"] for source in sources), 3)
        entries[device, backend] = {"device": device, "backend": backend, "break_even": figure, "sources": sources}
    return {"written_by": "python -m benchmarks.break_even", "figures": [entries[key] for key in sorted(entries)]}


def draw(contents: Mapping[str, Any]) -> Table:
    """The figures as a table for people."""
    table = Table(title="break-even of dense calls", caption="share of active sites above which calls run densely")
    for column in ("device", "backend", "break-even", "measured from"):
        table.add_column(column)
    for entry in contents["figures"]:
        sources = "; ".join(
            f"{source['model']} on {source['machine']}, torch {source['torch']}: {source['break_even']:.1%}"
            for source in entry["sources"]
        )
        table.add_row(entry["device"], entry["backend"], f"{entry['break_even']:.1%}", sources)
    return table


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("reports", type=Path, nargs="+", metavar="FILE", help="JSON of benchmarks.step_latency")
    parser.add_argument("--output", type=Path, default=PACKAGE_FILE, help="file to write; default: the package's own")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Fit, print and write the figures.

    Raises:
        SystemExit: no report reaches a break-even.
    """
    options = parse(arguments)
    measured: list[Measured] = []
    console = Console()
    for path in options.reports:
        of_report = measurements(path.name, json.loads(path.read_text(encoding="utf-8")))
        measured += of_report
        short = [one.source["model"] for one in of_report if crossing(one.points) is None]
        reason = "no report of step_latency" if not of_report else ", ".join(short) + " ends below its break-even"
        if short or not of_report:
            console.print(f"{path.name}: {reason}, left out", highlight=False)
    if all(crossing(one.points) is None for one in measured):
        raise SystemExit("no report reaches a break-even; run benchmarks.step_latency with --dense-above 1 up to 100 %")
    contents = fit(measured, json.loads(PACKAGE_FILE.read_text(encoding="utf-8")))
    options.output.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    console.print(draw(contents))
    console.print(f"written to {options.output}", highlight=False, soft_wrap=True)
    return contents


if __name__ == "__main__":
    main()
