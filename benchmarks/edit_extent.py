"""What tells an edit of one object from one of the whole picture, and after how many steps?

Pairs of captions (``fisedit eval --make-pairs``) are run densely side by side from one noise for a few steps. After
every step ``early-difference`` says how far the change is from local: *quiet*, the mean difference outside what
changed over that inside. The table has its range by kind of edit; the result keeps every pair, with what the detector
decided, after how many steps and with which mask.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: make the repository's root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.table import Table

from benchmarks.support.first_steps import STEPS, first_latents, parse_pairs
from benchmarks.support.harness import Report, machine, prepare, versions
from fisedit_compiler import masks
from fisedit_compiler.evaluation.pairs.grammar import make_pairs
from fisedit_compiler.evaluation.pairs.pairs import LOCAL_KINDS, SCENE_KINDS, EditPair
from fisedit_compiler.models import load_pipeline
from fisedit_compiler.pipelines.detectors import EarlyDifference


def measure(pipe: Any, number: int, pair: EditPair, steps: int) -> dict[str, Any]:
    """Quiet after every step of one pair, and what the detector decides as an edit asks it."""
    assert pair.seed is not None
    latents = first_latents(
        pipe,
        prompt=[pair.input, pair.output],
        num_inference_steps=steps,
        guidance_scale=5.0,
        generator=[torch.Generator("cpu").manual_seed(pair.seed) for _ in range(2)],
    )
    seen = [both.split(1) for both in latents]
    quiet = []
    for base, edited in seen:
        one = EarlyDifference()
        one.update(edited, base)
        found = one.decide(last=True)
        assert found is not None
        quiet.append(found.quiet)
    detector, decided = EarlyDifference(), None
    looks = detector.looks(steps)
    for base, edited in seen[:looks]:
        detector.update(edited, base)
        decided = detector.decide(last=detector.steps == looks)
        if decided is not None:
            break
    assert decided is not None
    return {
        "line": number,
        "kind": pair.kind,
        "edit": pair.edit,
        "quiet": [None if value is None else round(value, 4) for value in quiet],
        "calls": detector.steps,
        "everywhere": decided.everywhere,
        "area": round(masks.area(decided.mask), 4),
    }


def draw(rows: list[dict[str, Any]]) -> Table:
    """The pairs by kind of edit as a table for people."""
    table = Table(title="how far from local", caption="quiet: smallest, median and largest; calls: mean and most")
    heads = ("kind", "pairs", *(f"step {step}" for step in range(1, STEPS + 1)), "calls", "everywhere", "smallest mask")
    for column in heads:
        table.add_column(column, justify="left" if column == "kind" else "right")

    def add(name: str, chosen: list[dict[str, Any]]) -> None:
        if not chosen:
            return
        cells = []
        for step in range(STEPS):
            values = [row["quiet"][step] for row in chosen if row["quiet"][step] is not None]
            cells.append(f"{min(values):.3f} {statistics.median(values):.3f} {max(values):.3f}" if values else "-")
        calls = [row["calls"] for row in chosen]
        everywhere = sum(row["everywhere"] for row in chosen)
        smallest = min(row["area"] for row in chosen)
        table.add_row(
            name, str(len(chosen)), *cells, f"{statistics.fmean(calls):.2f} {max(calls)}", str(everywhere),
            f"{smallest:.1%}",
        )  # fmt: skip

    add("local", [row for row in rows if row["kind"] in LOCAL_KINDS])
    add("scene-wide", [row for row in rows if row["kind"] in SCENE_KINDS])
    for kind in dict.fromkeys(row["kind"] for row in rows):
        add(kind, [row for row in rows if row["kind"] == kind])
    return table


def main(arguments: list[str] | None = None, pipeline: Callable[..., Any] = load_pipeline) -> Report:
    """Run the benchmark, print and write its report."""
    options = parse_pairs(str(__doc__).splitlines()[0], arguments, pairs=40, seed=0, what="pairs of captions")
    device, dtype = prepare(options)
    settings = {"pairs": options.pairs, "seed": options.seed, "steps": options.steps, "dtype": str(dtype)}
    pipe = pipeline(device=device, dtype=dtype)
    rows = []
    with torch.no_grad():
        for number, pair in enumerate(make_pairs(options.pairs, options.seed), start=1):
            rows.append(measure(pipe, number, pair, options.steps))
            print(f"{number} of {options.pairs}: {pair.edit}", flush=True)
    report = Report("edit_extent", settings, machine(device), versions(), rows)
    report.publish(draw(rows), options.json)
    return report


if __name__ == "__main__":
    main()
