"""What does it cost to know what a module is: when a mode is entered, and between two calls of a run?

Times the key of a UNet of a published size, untrained: its structure read whole (once, and after a change), its key
when nothing changed (contents of all weights are compared), the look between two calls, timed inside an edit, where the
processor's caches are as a run leaves them, and all of entering an edit and of leaving it, key and mask included.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: make the repository's root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.table import Table

from benchmarks.support.harness import (
    Report,
    Stopwatch,
    Timing,
    alternate,
    argument_parser,
    machine,
    positive,
    prepare,
    versions,
)
from benchmarks.support.subjects import UNETS, make_call, random_unet, square_mask

WHAT = {
    "structure": "structure, read whole",
    "key": "key when nothing changed",
    "glance": "look between two calls",
    "enter": "entering an edit",
    "leave": "leaving an edit",
}


def measure(unet: torch.nn.Module, device: torch.device, *, repeats: int, warmup: int) -> list[dict[str, Any]]:
    """One row each for reading the structure, comparing the key, and looking between two calls."""
    from fisedit_compiler.capture.keys import ModelState
    from fisedit_compiler.capture.keys.structure import read_structure

    state = ModelState(unet)
    state.read()
    runs = {"structure": lambda: read_structure(unet), "key": state.read}
    rows = []
    for name, run in runs.items():
        stopwatch = alternate([partial(_timed, name, run)], repeats=repeats, warmup=warmup, device=device)
        rows.append({"what": WHAT[name], **stopwatch[name].as_dict("host")})
    timings = looks(unet, calls=warmup + repeats, warmup=warmup)
    return [*rows, *({"what": WHAT[name], **timing.as_dict("host")} for name, timing in timings.items())]


def _timed(name: str, run: Callable[[], Any], stopwatch: Stopwatch) -> None:
    stopwatch.time(name, run)


class _LeaveNow(Exception):
    """Ends an edit before its first call."""


def looks(unet: torch.nn.Module, *, calls: int, warmup: int) -> dict[str, Timing]:
    """Times inside edits of 5 % at 64 x 64 latents: of the looks between the calls of one, which wait for nothing, and
    of entering and leaving as many."""
    from fisedit_compiler import sparsify
    from fisedit_compiler.capture.keys import ModelState

    compiled, call = sparsify(unet), make_call(unet, batch=2, height=64, width=64)
    times: list[float] = []
    glance = ModelState.glance

    def timed(state: ModelState) -> Any:
        start = time.perf_counter()
        key = glance(state)
        times.append((time.perf_counter() - start) * 1e3)
        return key

    with torch.no_grad():
        with compiled.record() as recording:
            for _ in range(calls):
                call.dense(compiled)
        ModelState.glance = timed  # type: ignore[method-assign, assignment]
        try:
            with compiled.edit(recording, square_mask(0.05, 64, 64)):
                for _ in range(calls):
                    call.dense(compiled)
        finally:
            ModelState.glance = glance  # type: ignore[method-assign]
        entering, leaving = [], []
        for _ in range(calls):
            with suppress(_LeaveNow):
                start = time.perf_counter()
                with compiled.edit(recording, square_mask(0.05, 64, 64)):
                    entering.append((time.perf_counter() - start) * 1e3)
                    start = time.perf_counter()
                    raise _LeaveNow
            leaving.append((time.perf_counter() - start) * 1e3)
    measured = {"glance": times, "enter": entering, "leave": leaving}
    return {name: Timing(tuple(values[warmup:])) for name, values in measured.items()}


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
