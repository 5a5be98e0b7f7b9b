"""What does wrapping a UNet cost while nothing is edited, and what does recording cost?

The bare module, the compiled module in no mode, and the compiled module while it records are timed in turn on
the same inputs. The first call of every recording is compared with the module itself and has a row of its own; a run of
``n`` calls costs one first call and ``n - 1`` others. Ratios are to the bare module: 1.00 is no cost.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: make the repository's root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.table import Table

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
from benchmarks.support.subjects import Call, load_unet, make_call

MODES = ("bare", "wrapped", "first recorded", "recording")


def measure(unet: torch.nn.Module, compiled: Any, call: Call, *, repeats: int, warmup: int) -> list[dict[str, Any]]:
    """One row a mode, each with its ratio to the bare module."""

    def bare(stopwatch: Stopwatch) -> None:
        stopwatch.time("bare", lambda: call.dense(unet))

    def wrapped(stopwatch: Stopwatch) -> None:
        stopwatch.time("wrapped", lambda: call.dense(compiled))

    def recording(stopwatch: Stopwatch) -> None:
        with compiled.record():
            stopwatch.time("first recorded", lambda: call.dense(compiled))
            stopwatch.time("recording", lambda: call.dense(compiled))

    stopwatch = alternate([bare, wrapped, recording], repeats=repeats, warmup=warmup, device=call.sample.device)
    baseline = stopwatch["bare"].median_ms
    return [
        {
            "mode": mode,
            **stopwatch[mode].as_dict("call"),
            "ratio": round(stopwatch[mode].median_ms / baseline, 3),
        }
        for mode in MODES
    ]


def draw(rows: list[dict[str, Any]], title: str) -> Table:
    """The rows as a table for people."""
    table = Table(title=title, caption="median ± interquartile range; ratio to the bare module")
    for column in ("mode", "ms", "ratio"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    for row in rows:
        table.add_row(row["mode"], f"{row['call_ms']:.1f} ± {row['call_iqr_ms']:.1f}", f"{row['ratio']:.3f}")
    return table


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argument_parser(str(__doc__).splitlines()[0], repeats=15)
    parser.add_argument("--model", type=Path, metavar="DIR", help="a model in diffusers layout; default: embedded")
    parser.add_argument("--height", type=positive, default=64, help="of the latents")
    parser.add_argument("--width", type=positive, default=64, help="of the latents")
    parser.add_argument("--batch", type=positive, default=2, help="2 is one image with guidance")
    parser.add_argument("--warmup", type=positive, default=2, help="untimed repeats before the timed ones")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> Report:
    """Run the benchmark, print and write its report."""
    options = parse(arguments)
    device, dtype = prepare(options)
    from fisedit_compiler import sparsify

    facts = machine(device)
    unet = load_unet(options.model, device, dtype)
    tokens = 77 if options.model else 32
    call = make_call(unet, batch=options.batch, height=options.height, width=options.width, tokens=tokens)
    with torch.no_grad():
        rows = measure(unet, sparsify(unet), call, repeats=options.repeats, warmup=options.warmup)
    settings = {
        "model": options.model.name if options.model else "emoji-scenes",
        "latents": list(call.sample.shape),
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": options.repeats,
        "warmup": options.warmup,
    }
    report = Report("wrapper_overhead", settings, facts, versions(), rows)
    report.publish(draw(rows, f"{settings['model']}, latents {settings['latents']}"), options.json)
    return report


if __name__ == "__main__":
    main()
