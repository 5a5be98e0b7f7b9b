"""Which region do the detectors find after how many steps, and do reused cross-attention maps make it steadier?

For pairs of captions with a known region (``fisedit eval --make-pairs``) a base is generated with its cross-attention
maps, and the edit runs densely for a few steps: with its own maps, with the columns of unchanged words taken from the
base, and with those of the end and padding tokens too. After every step each detector is asked what it would say. Its
mask is compared with the union of the object before and after, seen in the finished dense pictures; with the same
detector's mask one step later; and with its mask after the last step. *Quiet* is what the detector says of its own
split, the mean difference outside the mask's core over that inside: the smaller, the less depends on where it is split.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: make the repository's root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.support.first_steps import STEPS, first_latents, parse_pairs
from benchmarks.support.harness import Report, machine, prepare, versions
from fisedit_compiler import Editor, masks
from fisedit_compiler.evaluation.pairs.grammar import make_pairs
from fisedit_compiler.evaluation.pairs.objects import ground_truth
from fisedit_compiler.evaluation.pairs.pairs import LOCAL_KINDS, EditPair
from fisedit_compiler.models import load_pipeline
from fisedit_compiler.pipelines.detectors import DetectedMask, make_mask_detector, mask_detectors
from fisedit_compiler.pipelines.editing.runs import Generation
from fisedit_compiler.pipelines.editing.words import guided_columns, token_columns

REUSE: dict[str, dict[str, bool] | None] = {"none": None, "words": {}, "words and ends": {"align_padding": True}}
"""What is taken from the recorded maps, as options of ``token_columns``."""


@contextmanager
def reusing(editor: Editor, base: Generation, columns: Tensor | None) -> Iterator[None]:
    """A dense edit of the base that takes columns of its maps."""
    assert base.recording is not None
    with editor.compiled.edit(base.recording) as session:
        session.reuse_maps(columns)
        yield


def first_steps(editor: Editor, base: Generation, prompt: str, columns: Tensor | None) -> list[Tensor]:
    """Latents after each of the first steps of the dense edit."""
    settings = base.settings
    return first_latents(
        editor.pipe,
        reusing(editor, base, columns),
        prompt=prompt,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        height=settings.height,
        width=settings.width,
        generator=torch.Generator("cpu").manual_seed(settings.seed),
    )


def found_by_step(detector: str, seen: list[Tensor], base: Generation) -> list[DetectedMask]:
    """What a detector would say if every step were its last."""
    found = []
    for last in range(1, len(seen) + 1):
        fresh = make_mask_detector(detector)
        for step in range(last):
            fresh.update(seen[step], base.latents[step])
        decided = fresh.decide(last=True)
        assert decided is not None
        found.append(decided)
    return found


def overlap(first: Tensor, second: Tensor) -> float:
    """Intersection over union of two masks; 1 if both are empty."""
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else 1.0


def measure(editor: Editor, pair: EditPair, steps: int) -> dict[tuple[str, str, int], dict[str, float]] | None:
    """Figures of one pair by detector, reuse and step; ``None`` if the object is not found in the pictures."""
    assert pair.seed is not None
    base = editor.generate(pair.input, seed=pair.seed, num_inference_steps=steps, maps=STEPS)
    truth = ground_truth(pair, base.image, editor.dense(base, pair.output).image)
    if truth is None:
        return None
    sites = masks.to_site_mask(truth.pixels, *base.latents[0].shape[-2:])
    figures = {}
    for reuse, options in REUSE.items():
        columns = None
        if options is not None:
            columns = guided_columns(token_columns(editor.pipe.tokenizer, pair.input, pair.output, **options))
        seen = first_steps(editor, base, pair.output, columns)
        for detector in mask_detectors():
            decided = found_by_step(detector, seen, base)
            found = [one.mask for one in decided]
            for step, mask in enumerate(found):
                quiet = decided[step].quiet
                figures[detector, reuse, step + 1] = {
                    "area_over_object": masks.area(mask) / masks.area(sites),
                    "recall": int((mask & sites).sum()) / int(sites.sum()),
                    "to_next": overlap(mask, found[min(step + 1, STEPS - 1)]),
                    "to_last": overlap(mask, found[-1]),
                    "quiet": 0.0 if quiet is None else quiet,
                }
    return figures


def summarise(measured: list[dict[tuple[str, str, int], dict[str, float]]]) -> list[dict[str, Any]]:
    """Means over the pairs, and of every figure the paired difference to the run without reuse, with its error."""
    rows = []
    for detector, reuse, step in measured[0]:
        row: dict[str, Any] = {"detector": detector, "reuse": reuse, "step": step, "pairs": len(measured)}
        for figure in measured[0][detector, reuse, step]:
            values = [pair[detector, reuse, step][figure] for pair in measured]
            changes = [pair[detector, reuse, step][figure] - pair[detector, "none", step][figure] for pair in measured]
            row[figure] = round(statistics.fmean(values), 4)
            row[f"{figure}_median"] = round(statistics.median(values), 4)
            row[f"{figure}_change"] = round(statistics.fmean(changes), 4)
            error = statistics.stdev(changes) / len(changes) ** 0.5 if len(changes) > 1 else float("nan")
            row[f"{figure}_change_error"] = round(error, 4)
        rows.append(row)
    return rows


def draw(rows: list[dict[str, Any]]) -> Table:
    """The rows as a table for people."""
    table = Table(title="masks by step", caption="means; in brackets the paired change by reuse ± its standard error")
    columns = ("detector", "reuse", "step", "area : object", "recall", "IoU to the next", "IoU to the last", "quiet")
    for column in columns:
        table.add_column(column, justify="left" if column in ("detector", "reuse") else "right")

    def cell(row: dict[str, Any], figure: str) -> str:
        change = f" ({row[f'{figure}_change']:+.4f} ± {row[f'{figure}_change_error']:.4f})"
        return f"{row[figure]:.3f}" + (change if row["reuse"] != "none" else "")

    for row in rows:
        figures = (cell(row, figure) for figure in ("area_over_object", "recall", "to_next", "to_last", "quiet"))
        table.add_row(row["detector"], row["reuse"], str(row["step"]), *figures)
    return table


def main(arguments: list[str] | None = None, pipeline: Callable[..., Any] = load_pipeline) -> Report:
    """Run the benchmark, print and write its report."""
    what = "pairs of captions, local edits only"
    options = parse_pairs(str(__doc__).splitlines()[0], arguments, pairs=8, seed=1, what=what)
    device, dtype = prepare(options)
    settings = {"pairs": options.pairs, "seed": options.seed, "steps": options.steps, "dtype": str(dtype)}
    measured: list[dict[tuple[str, str, int], dict[str, float]]] = []
    # Twice as many as wanted are made: some are of the whole scene, in others the object is not found.
    pairs = [pair for pair in make_pairs(2 * options.pairs + 8, options.seed) if pair.kind in LOCAL_KINDS]
    with torch.no_grad(), Editor(pipeline(device=device, dtype=dtype)) as editor:
        for pair in pairs:
            if len(measured) == options.pairs:
                break
            figures = measure(editor, pair, options.steps)
            if figures is not None:
                measured.append(figures)
                print(f"{len(measured)} of {options.pairs}: {pair.edit}", flush=True)
    rows = summarise(measured)
    report = Report("mask_stability", settings, machine(device), versions(), rows)
    report.publish(draw(rows), options.json)
    return report


if __name__ == "__main__":
    main()
