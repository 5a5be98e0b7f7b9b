"""``Editor(pipe)`` with no setting at all, beside Editors with a named backend and the dense pipeline.

What ``edit_latency --as-it-comes`` adds to its rows. Each Editor records a base of its own, and they follow each other,
so that only one recording lies in memory; each is timed in turn with the dense runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from benchmarks.support.harness import Stopwatch, alternate

if TYPE_CHECKING:
    from fisedit_compiler import Editor, SparsifyConfig
    from fisedit_compiler.config import Backend

AS_IT_COMES = "editor, as it comes"


def configs(device: torch.device) -> Mapping[str, SparsifyConfig | None]:
    """What each Editor is given: nothing, or its own default with a backend by name."""
    from fisedit_compiler.pipelines.editor import EDITOR_CONFIG

    named: tuple[Backend, ...] = ("inductor", "eager") if device.type == "cuda" else ("eager",)
    found: dict[str, SparsifyConfig | None] = {AS_IT_COMES: None}
    return found | {f"editor, {name}": replace(EDITOR_CONFIG, backend=name) for name in named}


def measure(subject: Any, unet: Any, prompt: str, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per Editor, mask area and dense baseline.

    Args:
        subject: an ``edit_latency.Subject``, whose pipeline and dense runs are used.
        unet: the UNet as nothing has compiled it.
        prompt: of the bases.
        settings: of the bases, for :meth:`Editor.generate`.
    """
    from fisedit_compiler import Editor

    rows = []
    for name, config in configs(subject.device).items():
        subject.pipe.unet = unet
        start = time.perf_counter()
        with Editor(subject.pipe, config) if config else Editor(subject.pipe) as editor:
            base = editor.generate(prompt, **settings)
            facts = {"base_s": _since(start, subject.device)}
            for fraction in subject.options.fractions:
                rows += _rows(subject, name, editor, base, fraction, facts)
            refused = [executable.backend.refused for executable in editor.compiled._programs.executables()]
        for row in rows:
            if row["row"] == name:
                row["refused"] = next(filter(None, refused), None)
    return rows


def _rows(
    subject: Any, name: str, editor: Editor, base: Any, fraction: float, facts: dict[str, Any]
) -> list[dict[str, Any]]:
    device, options, mask = subject.device, subject.options, subject.mask(fraction)
    compiled = editor.compiled

    def edit() -> Any:
        subject.pipe.unet = compiled
        return editor.edit(base, next(subject.prompts), mask=mask)

    start = time.perf_counter()
    unchanged = edit().unchanged_outside
    first = _since(start, device)

    def timed(stopwatch: Stopwatch) -> None:
        stopwatch.time("editor", edit)

    def dense(baseline: str, stopwatch: Stopwatch) -> None:
        subject.pipe.unet = subject.dense[baseline]
        stopwatch.time(baseline, partial(subject.run, next(subject.prompts)))

    sides: list[Callable[[Stopwatch], None]] = [*(partial(dense, baseline) for baseline in subject.dense), timed]
    stopwatch = alternate(sides, repeats=options.repeats, warmup=options.warmup, device=device)
    subject.pipe.unet = compiled
    return [
        {
            "row": name,
            "model": subject.name,
            "image": f"{subject.side}x{subject.side}",
            "steps": subject.steps,
            "mask_fraction": round(mask.float().mean().item(), 4),
            "requested_fraction": fraction,
            "baseline": baseline,
            **stopwatch[baseline].as_dict("baseline"),
            **stopwatch["editor"].as_dict("editor"),
            "ratio": round(stopwatch[baseline].median_ms / stopwatch["editor"].median_ms, 3),
            "first_edit_s": first,
            "unchanged_outside": unchanged,
            **facts,
        }
        for baseline in subject.dense
    ]


def _since(start: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return round(time.perf_counter() - start, 3)


def draw(rows: list[dict[str, Any]]) -> Table:
    """The rows as a table for people."""
    table = Table(title="whole edits by Editors", caption="median ± interquartile range; ratio = baseline / editor")
    for column in ("model", "steps", "mask", "row", "baseline", "baseline ms", "editor ms", "ratio", "first edit s"):
        table.add_column(column, justify="left" if column in ("model", "row", "baseline") else "right")
    for row in rows:
        table.add_row(
            row["model"],
            str(row["steps"]),
            f"{row['mask_fraction']:.1%}",
            row["row"] if row["refused"] is None else f"{row['row']} (refused: eager)",
            row["baseline"],
            *(f"{row[f'{side}_ms']:.0f} ± {row[f'{side}_iqr_ms']:.0f}" for side in ("baseline", "editor")),
            f"{row['ratio']:.2f}x",
            f"{row['first_edit_s']:.1f}",
        )
    return table
