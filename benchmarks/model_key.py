"""What does it cost to know what a module is: when a mode is entered, and between two calls of a run?

Times the key of a UNet of a published size, untrained: its structure read whole (once, and after a change), its key
when nothing changed (entered modes; contents of all weights are compared), and the look between two calls.
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

from benchmarks.harness import Report, Stopwatch, alternate, argument_parser, machine, positive, prepare, versions
from benchmarks.subjects import UNETS, random_unet

WHAT = {
    "structure": "structure, read whole",
    "key": "key when nothing changed",
    "glance": "look between two calls",
}


def measure(unet: torch.nn.Module, device: torch.device, *, repeats: int, warmup: int) -> list[dict[str, Any]]:
    """One row each for reading the structure, comparing the key, and looking between two calls."""
    from fisedit_compiler.keys import ModelState
    from fisedit_compiler.keys.structure import read_structure

    state = ModelState(unet)
    state.read()
    runs = {"structure": lambda: read_structure(unet), "key": state.read, "glance": state.glance}

    def timed(name: str) -> Any:
        return lambda stopwatch: stopwatch.time(name, runs[name])

    stopwatch: Stopwatch = alternate([timed(name) for name in runs], repeats=repeats, warmup=warmup, device=device)
    return [{"what": WHAT[name], **stopwatch[name].as_dict("host")} for name in runs]


def draw(rows: list[dict[str, Any]], title: str) -> Table:
    """The rows as a table for people."""
    table = Table(title=title, caption="median ± interquartile range")
    table.add_column("what")
    table.add_column("ms", justify="right")
    for row in rows:
        table.add_row(row["what"], f"{row['host_ms']:.3f} ± {row['host_iqr_ms']:.3f}")
    return table


def main(arguments: list[str] | None = None) -> Report:
    """Run the benchmark, print and write its report."""
    parser = argument_parser(str(__doc__).splitlines()[0], repeats=30)
    parser.add_argument("--model", choices=sorted(UNETS), default="sd21")
    parser.add_argument("--warmup", type=positive, default=3, help="untimed repeats before the timed ones")
    options: argparse.Namespace = parser.parse_args(arguments)
    device, dtype = prepare(options)
    facts = machine(device)
    unet = random_unet(options.model, device, dtype)
    rows = measure(unet, device, repeats=options.repeats, warmup=options.warmup)
    settings = {"model": options.model, "dtype": str(dtype).removeprefix("torch."), "repeats": options.repeats}
    report = Report("model_key", settings, facts, versions(), rows)
    report.publish(draw(rows, f"{options.model} on {device}"), options.json)
    return report


if __name__ == "__main__":
    main()
