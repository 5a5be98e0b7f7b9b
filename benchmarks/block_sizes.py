"""Is the adaptive block size as good as the best fixed one? Whole sparse calls, by mask and block size.

One run is recorded; then, for compact, scattered and thin masks, the same edit is timed with its convolutions in blocks
of 1, 2, 4 and 8 and with the sizes that the cost model chooses, in turn. ``over_best`` is adaptive over the best fixed
size: 1.05 is 5 % slower. By default the embedded model is measured, with ``--models`` full-size UNets with random
weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: make the repository's root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.ablation import EMBEDDED, MODELS, load
from benchmarks.support.harness import (
    Report,
    Stopwatch,
    alternate,
    argument_parser,
    forget_compiled,
    machine,
    positive,
    prepare,
    versions,
)
from benchmarks.support.subjects import Run, scattered_mask, square_mask, thin_mask
from fisedit_compiler.geometry.patches import BLOCK_SIZES
from fisedit_compiler.geometry.site_plan import SitePlan

ADAPTIVE = "adaptive"
ALLOWED = 1.05
"""What the adaptive size may cost over the best fixed one."""


def masks(height: int, width: int) -> dict[str, Tensor]:
    """The masks, by name."""
    compact = {f"compact {fraction:.0%}": square_mask(fraction, height, width) for fraction in (0.05, 0.15, 0.3)}
    return {**compact, "scattered": scattered_mask(0.04, height, width), "thin": thin_mask(height, width)}


def edit(
    compiled: Any, recording: Any, run: Run, mask: Tensor, plan: SitePlan | None, name: str, watch: Stopwatch
) -> Any:
    """One edit of two calls on a plan (``None``: the adaptive one); the second call is timed.

    The first call also computes what depends on the prompt alone.

    Returns:
        The plan that was used.
    """
    samples = run.edited_samples(mask)
    with compiled.edit(recording, mask=mask) as session:
        session.plan = plan
        run.dense(compiled, 0, samples, run.prompt)
        watch.time(name, partial(run.dense, compiled, 1, samples, run.prompt))
    return session.plan


def measure(compiled: Any, run: Run, kinds: list[str], *, repeats: int, warmup: int) -> Iterator[dict[str, Any]]:
    """The rows of one model, one a mask, as they are known."""
    device = run.samples[0].device
    with compiled.record() as recording:
        for call in range(run.calls):
            run.dense(compiled, call, run.samples, run.prompt)
    (program,) = compiled.programs
    known = masks(run.height, run.width)
    for kind in kinds:
        mask = known[kind]
        plain = SitePlan.build(mask, program.levels, program.convs)
        plans: dict[str, SitePlan | None] = {
            str(size): plain.blocked(dict.fromkeys(plain.active, size)).to(device) for size in BLOCK_SIZES
        }
        moved = mask.to(device)
        plans[ADAPTIVE] = None
        chosen = edit(compiled, recording, run, moved, None, ADAPTIVE, Stopwatch(device))
        sides = [partial(edit, compiled, recording, run, moved, plan, name) for name, plan in plans.items()]
        watch = alternate(sides, repeats=repeats, warmup=warmup, device=device)
        best = min((str(size) for size in BLOCK_SIZES), key=lambda name: watch[name].median_ms)
        over = watch[ADAPTIVE].median_ms / watch[best].median_ms
        levels = sorted({layer.key.target for layer in program.layers})
        yield (
            {
                "mask": kind,
                "mask_fraction": round(mask.float().mean().item(), 4),
                **{f"size_{size}_ms": round(watch[str(size)].median_ms, 3) for size in BLOCK_SIZES},
                **watch[ADAPTIVE].as_dict(ADAPTIVE),
                "chosen": {str(level): chosen.block_size(level) for level in levels},
                "best_fixed": int(best),
                "over_best": round(over, 3),
                "within": over <= ALLOWED,
            }
        )


def draw(rows: list[dict[str, Any]]) -> Table:
    """The rows as a table for people."""
    table = Table(
        title="block sizes",
        caption="median ms of a sparse call; sizes chosen from the finest level on; adaptive : best fixed size",
    )
    for column in ("model", "mask", "area", *(f"size {size}" for size in BLOCK_SIZES), ADAPTIVE, "chosen", "over best"):
        table.add_column(column, justify="left" if column in ("model", "mask", "chosen") else "right")
    for row in rows:
        chosen = " ".join(map(str, row["chosen"].values()))
        table.add_row(
            row["model"],
            row["mask"],
            f"{row['mask_fraction']:.1%}",
            *(f"{row[f'size_{size}_ms']:.2f}" for size in BLOCK_SIZES),
            f"{row['adaptive_ms']:.2f}",
            chosen,
            f"{row['over_best']:.3f}" + ("" if row["within"] else " (more than 5 %)"),
        )
    return table


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argument_parser(str(__doc__).splitlines()[0], repeats=15)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[EMBEDDED], help="full-size ones: on a GPU")
    parser.add_argument("--size", type=positive, help="sites along a side of the latents; default: the model's")
    parser.add_argument(
        "--masks", nargs="+", choices=tuple(masks(64, 64)), default=list(masks(64, 64)), help="which ones"
    )
    parser.add_argument("--warmup", type=positive, default=3, help="untimed repeats before the timed ones")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> Report:
    """Run the benchmark, print and write its report."""
    from fisedit_compiler import SparsifyConfig, sparsify

    options = parse(arguments)
    device, dtype = prepare(options)
    backend: Any = "inductor" if device.type == "cuda" else "eager"
    settings = {
        "models": options.models,
        "size": options.size,
        "batch": 2,
        "backend": backend,
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": options.repeats,
        "warmup": options.warmup,
    }
    rows: list[dict[str, Any]] = []
    report = Report("block_sizes", settings, machine(device), versions(), rows)
    for name in options.models:
        with torch.no_grad():
            unet, _, tokens = load(name, device, dtype)
            run = Run(unet, calls=2, tokens=tokens, size=options.size)
            compiled = sparsify(unet, SparsifyConfig(backend=backend, dense_above=1.0))
            for row in measure(compiled, run, options.masks, repeats=options.repeats, warmup=options.warmup):
                rows.append({"model": name, **row})
                print(rows[-1], flush=True)
                if options.json is not None:
                    report.write(options.json)
        del unet, run, compiled
        forget_compiled(device)
    report.publish(draw(rows), options.json)
    return report


if __name__ == "__main__":
    main()
