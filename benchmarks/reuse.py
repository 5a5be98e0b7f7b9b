"""What does reuse across steps save in the calls of an edit?

A run of the embedded model, or of another one, is recorded by its pipeline. Then the same edit is made without reuse
and with it, in turn, with one mask from the first call on. ``mean_call_ms`` is the mean time of a UNet call of an edit,
of which the median over edits is shown. ``full_ms`` and ``shallow_ms`` are medians of calls of either kind.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: make the repository's root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.table import Table

from benchmarks.step_latency import area, ran_on
from benchmarks.support.harness import Report, argument_parser, machine, positive, prepare, versions
from benchmarks.support.subjects import square_mask

FRACTIONS = (0.06,)
PROMPTS = ("a cat on a hill", "a dog on a hill")


def measure(editor: Any, base: Any, fraction: float, reuses: list[Any], *, repeats: int) -> list[dict[str, Any]]:
    """The rows of one mask area, one for every choice of reuse; the first edit of each is not timed."""
    mask = square_mask(fraction, *base.latents[0].shape[-2:])
    means: dict[Any, list[float]] = {reuse: [] for reuse in reuses}
    calls: dict[Any, list[tuple[str, float]]] = {reuse: [] for reuse in reuses}
    for repeat in range(repeats + 1):
        for reuse in reuses:
            report = editor.edit(base, PROMPTS[1], mask=mask, record=False, reuse=reuse).report
            if repeat:
                means[reuse].append(statistics.fmean(seconds for _, seconds in report.calls))
                calls[reuse] += report.calls
    without = statistics.median(means[reuses[0]])
    return [
        {
            "mask_fraction": round(mask.float().mean().item(), 4),
            "requested_fraction": fraction,
            "reuse": reuse,
            "calls": len(base.latents),
            "shallow_calls": sum(kind == "shallow" for kind, _ in calls[reuse]) // repeats,
            "mean_call_ms": round(1e3 * statistics.median(means[reuse]), 3),
            "mean_call_ms_lowest": round(1e3 * min(means[reuse]), 3),
            "mean_call_ms_highest": round(1e3 * max(means[reuse]), 3),
            "full_ms": _median(calls[reuse], "sparse"),
            "shallow_ms": _median(calls[reuse], "shallow"),
            "ratio": round(without / statistics.median(means[reuse]), 3),
        }
        for reuse in reuses
    ]


def _median(calls: list[tuple[str, float]], kind: str) -> float | None:
    times = [seconds for ran_as, seconds in calls if ran_as == kind]
    return round(1e3 * statistics.median(times), 3) if times else None


def draw(rows: list[dict[str, Any]], title: str) -> Table:
    """The rows as a table for people."""
    table = Table(title=title, caption="medians; ratio = mean call without reuse / with")
    for column in ("mask", "reuse", "shallow calls", "mean call ms", "full ms", "shallow ms", "ratio"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            f"{row['mask_fraction']:.1%}",
            str(row["reuse"]),
            f"{row['shallow_calls']} of {row['calls']}",
            f"{row['mean_call_ms']:.1f}",
            *("-" if row[name] is None else f"{row[name]:.1f}" for name in ("full_ms", "shallow_ms")),
            f"{row['ratio']:.2f}x",
        )
    return table


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argument_parser(str(__doc__).splitlines()[0], repeats=5)
    parser.add_argument("--model", type=Path, metavar="DIR", help="a model in diffusers layout; default: embedded")
    parser.add_argument("--fractions", type=area, nargs="+", metavar="F", default=list(FRACTIONS), help="mask areas")
    parser.add_argument("--tolerances", type=float, nargs="+", metavar="T", default=[], help="beside off and auto")
    parser.add_argument("--steps", type=positive, default=25, help="of the scheduler")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> Report:
    """Run the benchmark, print and write its report."""
    options = parse(arguments)
    device, dtype = prepare(options)
    from fisedit_compiler import Editor
    from fisedit_compiler.models import load_pipeline

    facts = machine(device)
    pipe = load_pipeline(options.model, dtype=dtype, device=device)
    editor = Editor(pipe, progress=False)
    reuses: list[Any] = ["off", "auto", *options.tolerances]
    with torch.no_grad():
        base = editor.generate(PROMPTS[0], seed=0, num_inference_steps=options.steps)
        rows = [
            row
            for fraction in options.fractions
            for row in measure(editor, base, fraction, reuses, repeats=options.repeats)
        ]
    settings = {
        "model": options.model.name if options.model else "emoji-scenes",
        "latents": list(base.latents[0].shape),
        "dtype": str(dtype).removeprefix("torch."),
        "backend": ran_on(editor.compiled, device),
        "norm": editor.compiled.sparsify_config.norm,
        "steps": options.steps,
        "repeats": options.repeats,
    }
    report = Report("reuse", settings, facts, versions(), rows)
    report.publish(draw(rows, f"{settings['model']}, {options.steps} steps"), options.json)
    return report


if __name__ == "__main__":
    main()
