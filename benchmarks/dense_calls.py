"""What do the dense calls cost in which an edit looks for its mask: with maps, or with half the batch recorded?

The bare module is timed in turn with a recording call, a recording call that keeps its cross-attention maps, a call of
an edit that reuses their columns, and a call of an edit of which half the batch is recorded. Ratios are to the bare
module.
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

CALLS = ("bare", "recording", "recording with maps", "reuse", "half recorded")


def measure(unet: torch.nn.Module, compiled: Any, call: Call, *, repeats: int, warmup: int) -> list[dict[str, Any]]:
    """One row a kind of call, each with its ratio to the bare module and the bytes of the maps it stores."""
    batch, tokens = call.base_text.shape[:2]
    half = call.edit_text.clone()
    half[: batch // 2] = call.base_text[: batch // 2]
    columns = torch.arange(tokens)
    columns[1:3] = -1
    with compiled.record(maps=1) as recording:
        call.dense(compiled)

    def bare(stopwatch: Stopwatch) -> None:
        stopwatch.time("bare", lambda: call.dense(unet))

    def record(stopwatch: Stopwatch) -> None:
        with compiled.record():
            stopwatch.time("recording", lambda: call.dense(compiled))

    def record_maps(stopwatch: Stopwatch) -> None:
        with compiled.record(maps=1):
            stopwatch.time("recording with maps", lambda: call.dense(compiled))

    def reuse(stopwatch: Stopwatch) -> None:
        with compiled.edit(recording) as session:
            session.reuse_maps(columns)
            stopwatch.time("reuse", lambda: call.dense(compiled, text=call.edit_text))
        assert session.reused_maps == [True] and session.computed_samples == [batch]

    def half_recorded(stopwatch: Stopwatch) -> None:
        with compiled.edit(recording) as session:
            stopwatch.time("half recorded", lambda: call.dense(compiled, text=half))
        assert session.computed_samples == [batch - batch // 2]

    sides = [bare, record, record_maps, reuse, half_recorded]
    stopwatch = alternate(sides, repeats=repeats, warmup=warmup, device=call.sample.device)
    recorded = recording.calls[0]
    map_bytes = sum(recorded.slots[name].nbytes for name in recorded.maps)
    return [
        {
            "call": kind,
            **stopwatch[kind].as_dict("call"),
            "ratio": round(stopwatch[kind].median_ms / stopwatch["bare"].median_ms, 3),
            "map_bytes": map_bytes if kind == "recording with maps" else 0,
        }
        for kind in CALLS
    ]


def draw(rows: list[dict[str, Any]], title: str) -> Table:
    """The rows as a table for people."""
    table = Table(title=title, caption="median ± interquartile range; ratio to the bare module")
    for column in ("call", "ms", "ratio", "maps, MiB"):
        table.add_column(column, justify="left" if column == "call" else "right")
    for row in rows:
        time = f"{row['call_ms']:.1f} ± {row['call_iqr_ms']:.1f}"
        maps = f"{row['map_bytes'] / 2**20:.1f}" if row["map_bytes"] else ""
        table.add_row(row["call"], time, f"{row['ratio']:.3f}", maps)
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
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": options.repeats,
        "warmup": options.warmup,
    }
    report = Report("dense_calls", settings, facts, versions(), rows)
    report.publish(draw(rows, f"{settings['model']}, latents {settings['latents']}"), options.json)
    return report


if __name__ == "__main__":
    main()
