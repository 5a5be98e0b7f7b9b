"""How long does a whole edit take as it comes, by every way to edit that the documents show?

Each way is opened on a stock pipeline without any setting, makes its base, and then edits with prompts never seen
before, wall clock from the prompt to the PIL picture, in turn with the dense runs of the pipeline (eager, and with a
UNet under torch.compile in its fastest form). The ways follow each other, so that only one recording lies in memory.
A way that fails costs no other one its row. ``tests/benchmarks/test_entry_points.py`` reads the documents and fails if
they show a way that has no row here.
"""

from __future__ import annotations

import argparse
import gc
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: make the repository's root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.markup import escape
from rich.table import Table

from benchmarks.step_latency import area
from benchmarks.support.harness import (
    Report,
    Stopwatch,
    Timing,
    alternate,
    argument_parser,
    forget_compiled,
    machine,
    prepare,
    versions,
)
from benchmarks.support.ways import WAYS
from benchmarks.support.whole_runs import (
    EAGER,
    WholeRuns,
    add_baselines,
    add_run_options,
    load_runs,
    noted,
    prompts,
)

PROMPT = "a golden {name} on the left and a rocket on the right"
"""Of the edits: a local change, so that a mask can be found."""


def measure(runs: WholeRuns, name: str) -> list[dict[str, Any]]:
    """The rows of one way, one a baseline."""
    way, options, pipe, device = WAYS[name], runs.options, runs.pipe, runs.device
    stock = {"unet": runs.dense[EAGER], "vae": pipe.vae}
    facts: dict[str, Any] = {}
    with ExitStack() as stack:
        stack.callback(_put, pipe, stock)
        with noted(facts, "base_s", device):
            opened = stack.enter_context(way.opened(runs, runs.mask(options.fraction)))
        with noted(facts, "first_edit_s", device):
            opened.edit()
        compiled = {part: getattr(pipe, part) for part in stock}

        def dense(baseline: str, stopwatch: Stopwatch) -> None:
            _put(pipe, stock)
            runs.time_dense_run(baseline, stopwatch)

        def edit(stopwatch: Stopwatch) -> None:
            _put(pipe, compiled)
            stopwatch.time("edit", opened.edit)

        sides: list[Callable[[Stopwatch], None]] = [*(partial(dense, baseline) for baseline in runs.dense), edit]
        stopwatch = alternate(sides, repeats=options.repeats, warmup=options.warmup, device=device)
        _put(pipe, compiled)
        about = opened.about()
        slow = sorted({why for why in opened.slow() if why})
    a_picture = Timing(tuple(sample / opened.pictures for sample in stopwatch["edit"].samples_ms))
    return [
        {
            "way": name,
            "model": runs.name,
            "image": f"{runs.side}x{runs.side}",
            "steps": runs.steps,
            "requested_fraction": options.fraction,
            **about,
            "pictures": opened.pictures,
            **facts,
            "baseline": baseline,
            **stopwatch[baseline].as_dict("baseline"),
            **a_picture.as_dict("edit"),
            "ratio": round(stopwatch[baseline].median_ms / a_picture.median_ms, 3),
            "slow": slow,
        }
        for baseline in runs.dense
    ]


def _put(pipe: Any, modules: Mapping[str, Any]) -> None:
    for name, module in modules.items():
        setattr(pipe, name, module)


def draw(rows: list[dict[str, Any]]) -> Table:
    """The rows as a table for people, and below it what was refused and what an edit changed outside its mask."""
    caption = "of a picture: median ± interquartile range; ratio = baseline / edit; base: with compilation"
    table = Table(title="whole edits as they come", caption=caption)
    columns = ("way", "mask", "calls", "base s", "first s", "edit ms", "baseline", "baseline ms", "ratio")
    for column in columns:
        table.add_column(column, justify="left" if column in ("way", "calls", "baseline") else "right")
    both = Table.grid()
    both.add_row(table)
    before: tuple[str, str] | None = None
    for row in rows:
        about = (row["model"], row["way"])
        if before is None or before[0] != row["model"]:
            table.add_section()
            table.add_row(f"[bold]{row['model']}, {row['image']}, {row['steps']} steps")
        table.add_row(
            *("" if about == before else cell for cell in _cells_of_edit(row)),
            row["baseline"],
            f"{row['baseline_ms']:.0f} ± {row['baseline_iqr_ms']:.0f}",
            f"{row['ratio']:.2f}x",
        )
        if about != before:
            changed = [] if row["unchanged_outside"] else ["THE LATENTS OUTSIDE THE MASK CHANGED"]
            for note in (*changed, *row["slow"]):
                both.add_row(escape(f"{row['model']}, {WAYS[row['way']].said}: {note}"))
        before = about
    return both


def _cells_of_edit(row: Mapping[str, Any]) -> tuple[str, ...]:
    calls = ", ".join(f"{count} {kind}" for kind, count in row["calls"].items())
    seconds = (f"{row[name]:.1f}" for name in ("base_s", "first_edit_s"))
    edit = f"{row['edit_ms']:.0f} ± {row['edit_iqr_ms']:.0f}"
    return (escape(WAYS[row["way"]].said), f"{row['mask_fraction']:.1%}", calls, *seconds, edit)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argument_parser(str(__doc__).splitlines()[0], repeats=5)
    add_run_options(parser)
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS), help="which are measured")
    parser.add_argument("--fraction", "--fractions", type=area, metavar="F", default=0.05, help="mask area, if given")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> Report:
    """Run the benchmark, print and write its report.

    Raises:
        SystemExit: a way could not be measured; the report of the others is written first.
    """
    options = parse(arguments)
    device, dtype = prepare(options)
    settings: dict[str, Any] = {
        "models": options.models,
        "ways": options.ways,
        "fraction": options.fraction,
        "guidance": options.guidance,
        "scheduler": options.scheduler,
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": options.repeats,
        "warmup": options.warmup,
        "dense_form": options.dense_form,
        "peers": {},
    }
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    report = Report("entry_points", settings, machine(device), versions(), rows)
    for name in options.models:
        print(f"{name}: building and compiling the dense baseline", flush=True)
        runs = load_runs(WholeRuns, name, options, device, dtype)
        settings["peers"] |= add_baselines(runs)
        runs.prompts = prompts(PROMPT)
        print(f"{name}: {runs.facts}", flush=True)
        for way in options.ways:
            try:
                found = measure(runs, way)
            except Exception:
                traceback.print_exc()
                print(f"{name}: {way!r} is left out", file=sys.stderr, flush=True)
                failed.append(f"{name} {way}")
                found = []
            rows += found
            print(*found, sep="\n", flush=True)
            _forget_run(device)
            if options.json is not None:
                report.write(options.json)
        del runs
        forget_compiled(device)
    report.publish(draw(rows), options.json)
    if failed:
        raise SystemExit(f"left out, with the errors printed above: {', '.join(failed)}")
    return report


def _forget_run(device: torch.device) -> None:
    """Give back what a recording took; what Dynamo compiled stays, the dense baseline among it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
