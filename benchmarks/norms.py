"""What do incremental statistics of norms cost a sparse call, and what does it cost to record the edit?

One model is compiled with recorded and with incremental statistics. For every mask area four kinds of sparse calls are
timed in turn, on the same inputs: either statistics, in an edit that is not recorded and in one that is. The Editor
uses incremental statistics and records its edits. ``sparsify()`` by itself uses recorded ones and records nothing;
ratios are to that. Bytes of a recorded call stand beside them.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: make the repository's root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.table import Table

from benchmarks.step_latency import area, ran_on
from benchmarks.support.harness import (
    Report,
    Stopwatch,
    alternate,
    argument_parser,
    machine,
    positive,
    prepare,
    versions,
)
from benchmarks.support.subjects import Call, load_unet, make_call, square_mask
from fisedit_compiler.config import Norm

FRACTIONS = (0.05, 0.15, 0.30)
NORMS: tuple[Norm, ...] = ("recorded", "incremental")


def measure(
    compiled: dict[Norm, Any], call: Call, fraction: float, *, repeats: int, warmup: int
) -> list[dict[str, Any]]:
    """The rows of one mask area: each of :data:`NORMS`, without and with a recording of the edit.

    Every edit has a prompt never seen before and makes two calls, of which the second is timed: the first also
    computes what depends on the prompt alone.
    """
    mask = square_mask(fraction, *call.sample.shape[-2:]).to(call.sample.device)
    recordings: dict[Norm, Any] = {}
    for norm, module in compiled.items():
        with module.record() as recordings[norm]:
            for _ in range(2):
                call.dense(module)

    def edit(norm: Norm, record: bool, stopwatch: Stopwatch) -> None:
        module, text = compiled[norm], torch.randn_like(call.edit_text)
        with module.edit(recordings[norm], mask=mask, record=record):
            call.dense(module, text=text)
            stopwatch.time(f"{norm} {record}", lambda: call.dense(module, text=text))

    kinds = [(norm, record) for norm in compiled for record in (False, True)]
    sides = [partial(edit, norm, record) for norm, record in kinds]
    stopwatch = alternate(sides, repeats=repeats, warmup=warmup, device=call.sample.device)
    baseline = stopwatch[f"{NORMS[0]} False"].median_ms
    return [
        {
            "mask_fraction": round(mask.float().mean().item(), 4),
            "requested_fraction": fraction,
            "norm": norm,
            "record": record,
            **stopwatch[f"{norm} {record}"].as_dict("sparse"),
            "ratio": round(stopwatch[f"{norm} {record}"].median_ms / baseline, 3),
            "recording_mib_per_call": round(recordings[norm].nbytes / 2**20 / 2, 2),
        }
        for norm, record in kinds
    ]


def draw(rows: list[dict[str, Any]], title: str) -> Table:
    """The rows as a table for people."""
    table = Table(title=title, caption="median ± interquartile range; ratio to recorded statistics without a recording")
    for column in ("mask", "statistics", "edit", "ms a call", "ratio"):
        table.add_column(column, justify="left" if column in ("statistics", "edit") else "right")
    for row in rows:
        table.add_row(
            f"{row['mask_fraction']:.1%}",
            row["norm"],
            "is recorded" if row["record"] else "is not recorded",
            f"{row['sparse_ms']:.1f} ± {row['sparse_iqr_ms']:.1f}",
            f"{row['ratio']:.2f}",
        )
    return table


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argument_parser(str(__doc__).splitlines()[0], repeats=15)
    parser.add_argument("--model", type=Path, metavar="DIR", help="a model in diffusers layout; default: embedded")
    parser.add_argument("--fractions", type=area, nargs="+", metavar="F", default=list(FRACTIONS), help="mask areas")
    parser.add_argument("--height", type=positive, default=64, help="of the latents")
    parser.add_argument("--width", type=positive, default=64, help="of the latents")
    parser.add_argument("--batch", type=positive, default=2, help="2 is one image with guidance")
    parser.add_argument("--warmup", type=positive, default=2, help="untimed repeats before the timed ones")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> Report:
    """Run the benchmark, print and write its report."""
    options = parse(arguments)
    device, dtype = prepare(options)
    from fisedit_compiler import SparsifyConfig, sparsify

    facts = machine(device)
    unet = load_unet(options.model, device, dtype)
    tokens = 77 if options.model else 32
    call = make_call(unet, batch=options.batch, height=options.height, width=options.width, tokens=tokens)
    compiled = {norm: sparsify(unet, SparsifyConfig(norm=norm, dense_above=1.0)) for norm in NORMS}
    with torch.no_grad():
        rows = [
            row
            for fraction in options.fractions
            for row in measure(compiled, call, fraction, repeats=options.repeats, warmup=options.warmup)
        ]
    settings = {
        "model": options.model.name if options.model else "emoji-scenes",
        "latents": list(call.sample.shape),
        "dtype": str(dtype).removeprefix("torch."),
        "backend": ran_on(compiled[NORMS[0]], device),
        "fractions": options.fractions,
        "repeats": options.repeats,
        "warmup": options.warmup,
    }
    report = Report("norms", settings, facts, versions(), rows)
    report.publish(draw(rows, f"{settings['model']}, latents {settings['latents']}"), options.json)
    return report


if __name__ == "__main__":
    main()
