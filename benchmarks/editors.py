"""``Editor(pipe)`` with no setting at all, beside Editors with a setting by name and the dense pipeline.

What ``edit_latency --as-it-comes`` adds to its rows: whole edits, the same without reuse across steps, and whole base
runs. Each Editor records a base of its own, and they follow each other, so that only one recording lies in memory; each
is timed in turn with the dense runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from rich.table import Table

from benchmarks.support.harness import Stopwatch, alternate
from benchmarks.support.peers import in_pipeline

if TYPE_CHECKING:
    from fisedit_compiler import Editor
    from fisedit_compiler.config import Reuse

AS_IT_COMES, DECODER, UNET_ALONE = "as it comes", "decoder too", "UNet alone"
EDITORS = (AS_IT_COMES, DECODER, UNET_ALONE, "inductor", "eager")
"""What an Editor is given: nothing, the VAE's decoder as a part (on a GPU that is the default) or the UNet alone, or a
backend by name."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which Editors are timed, and in what tasks."""
    parser.add_argument(
        "--as-it-comes", action="store_true", help="also time Editor(pipe) with no setting beside those with one"
    )
    parser.add_argument(
        "--editors", nargs="+", choices=EDITORS, default=list(EDITORS), help="with --as-it-comes: which"
    )
    parser.add_argument(
        "--no-bases", dest="bases", action="store_false", help="with --as-it-comes: no base runs, which compile first"
    )
    parser.add_argument("--only-editors", action="store_true", help="with --as-it-comes: nothing else")


@contextmanager
def _editor(pipe: Any, name: str) -> Iterator[Editor]:
    from fisedit_compiler import Editor
    from fisedit_compiler.pipelines.editor import EDITOR_CONFIG

    if name == AS_IT_COMES:
        editor = Editor(pipe)
    elif name == DECODER:
        editor = Editor(pipe, parts=("unet", "vae.decoder"))
    elif name == UNET_ALONE:
        editor = Editor(pipe, parts=("unet",))
    else:
        editor = Editor(pipe, replace(EDITOR_CONFIG, backend=name))  # type: ignore[arg-type]
    with editor:
        yield editor


def measure(subject: Any, unet: Any, prompt: str, settings: Mapping[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """For each Editor a row per task, mask area and dense baseline.

    Args:
        subject: an ``edit_latency.Subject``, whose pipeline and dense runs are used.
        unet: the UNet as nothing has compiled it.
        prompt: of the bases.
        settings: of the bases, for :meth:`Editor.generate`.
    """
    names = [name for name in subject.options.editors if name != "inductor" or subject.device.type == "cuda"]
    for name in names:
        subject.pipe.unet = unet
        start = time.perf_counter()
        with _editor(subject.pipe, name) as editor:
            base = editor.generate(prompt, **settings)
            facts = {"base_s": _since(start, subject.device)}
            dense_calls = {baseline: _dense_call_ms(subject, baseline) for baseline in subject.dense}
            found = []
            for fraction in subject.options.fractions:
                found += _edits(subject, name, editor, base, fraction, facts)
                print(found, flush=True)
            del base
            if subject.options.bases:
                found += _bases(subject, name, editor, settings, facts)
            executables = editor.compiled._programs.executables()
            refused = next(filter(None, (one.backend.refused or one.dense.refused for one in executables)), None)
        yield [{**row, "baseline_call_ms": dense_calls[row["baseline"]], "refused": refused} for row in found]


def _dense_call_ms(subject: Any, baseline: str) -> float:
    """Milliseconds of a UNet call in dense runs, timed as the Editor times its own: the median of the runs' means."""
    compiled, means = subject.pipe.unet, []
    for _ in range(subject.options.repeats):
        with in_pipeline(subject.pipe, subject.dense[baseline]):
            watched = subject.pipe.unet = _WatchedUNet(subject.pipe.unet, subject.device)
            subject.run(next(subject.prompts))
        means.append(watched.mean_ms())
    subject.pipe.unet = compiled
    return round(statistics.median(means), 3)


class _WatchedUNet:
    """Stands for a UNet in a pipeline and notes when its calls begin and end, on a GPU in its queue.

    A hook would be seen by torch.compile. The pipeline finds its device by its other parts.
    """

    def __init__(self, unet: Any, device: torch.device) -> None:
        self._unet, self._device = unet, device
        self._moments: list[tuple[Any, Any]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        begin = self._moment()
        result = self._unet(*args, **kwargs)
        self._moments.append((begin, self._moment()))
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._unet, name)

    def _moment(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mean_ms(self) -> float:
        """Of the calls after the first, which also waits for what depends on the prompt alone."""
        _now(self._device)
        on_gpu = self._device.type == "cuda"
        took = [begin.elapsed_time(end) if on_gpu else 1000 * (end - begin) for begin, end in self._moments]
        return statistics.fmean(took[1:] or took)


def _edits(
    subject: Any, name: str, editor: Editor, base: Any, fraction: float, facts: dict[str, Any]
) -> list[dict[str, Any]]:
    """Edits as they come, and with reuse switched off."""
    mask = subject.mask(fraction)
    calls: dict[str, list[float]] = {}
    compiled = editor.compiled

    def edit(task: str) -> Any:
        subject.pipe.unet = compiled
        reuse: Reuse | None = "off" if task == "edit, reuse off" else None
        result = editor.edit(base, next(subject.prompts), mask=mask, reuse=reuse)
        # The first call also computes what depends on the prompt alone.
        calls.setdefault(task, []).append(
            1000 * statistics.fmean(took for _, took in result.report.calls[1:] or result.report.calls)
        )
        return result

    start = time.perf_counter()
    unchanged = edit("edit").unchanged_outside
    first = _since(start, subject.device)
    if editor.compiled.sparsify_config.reuse != "off":
        edit("edit, reuse off")
    calls.clear()
    tasks = {task: partial(edit, task) for task in ("edit", "edit, reuse off")}
    rows = _rows(subject, name, tasks, compiled)
    about = {
        "mask_fraction": round(mask.float().mean().item(), 4),
        "requested_fraction": fraction,
        "first_edit_s": first,
        "unchanged_outside": unchanged,
        **facts,
    }
    shares = {task: _shares(subject, partial(edit, task)) for task in tasks}
    return [
        {**row, **about, **shares[row["task"]], "mean_call_ms": round(statistics.median(calls[row["task"]]), 3)}
        for row in rows
    ]


def _shares(subject: Any, edit: Callable[[], Any]) -> dict[str, float]:
    """What an edit consists of, in milliseconds: medians of runs with the queue drained around text and decoder.

    ``enter`` is everything before the text encoder, ``unet`` the sum of the calls, ``rest`` what is not named: the
    scheduler, the guidance, the step's callbacks, what is checked at the end, and the picture.
    """
    from fisedit_compiler.pipelines.decoding.vae import SparseVAE

    device, found = subject.device, []
    for _ in range(subject.options.repeats):
        spans: dict[str, tuple[float, float]] = {}
        with _spanned(type(subject.pipe), "encode_prompt", spans, device), _spanned(SparseVAE, "decode", spans, device):
            start = _now(device)
            result = edit()
            end = _now(device)
        text, decode = (_length(spans.get(name)) for name in ("encode_prompt", "decode"))
        enter = 1000 * (spans["encode_prompt"][0] - start)
        unet = 1000 * sum(took for _, took in result.report.calls)
        rest = 1000 * (end - start) - enter - text - unet - decode
        found.append({"enter_ms": enter, "text_ms": text, "unet_ms": unet, "decode_ms": decode, "rest_ms": rest})
    return {name: round(statistics.median(one[name] for one in found), 2) for name in found[0]}


@contextmanager
def _spanned(owner: type, name: str, spans: dict[str, tuple[float, float]], device: torch.device) -> Iterator[None]:
    """Inside the block the last call of a method notes when it began and ended, with nothing left in the queue."""
    method = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = _now(device)
        result = method(*args, **kwargs)
        spans[name] = (begin, _now(device))
        return result

    with mock.patch.object(owner, name, timed):
        yield


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _length(span: tuple[float, float] | None) -> float:
    return 0.0 if span is None else 1000 * (span[1] - span[0])


def _bases(
    subject: Any, name: str, editor: Editor, settings: Mapping[str, Any], facts: dict[str, Any]
) -> list[dict[str, Any]]:
    """Base runs that are recorded."""
    compiled = editor.compiled

    def base() -> None:
        subject.pipe.unet = compiled
        editor.generate(next(subject.prompts), **settings)

    # The second run of a size compiles its dense calls.
    start = time.perf_counter()
    base()
    facts = {**facts, "second_base_s": _since(start, subject.device)}
    return [{**row, **facts} for row in _rows(subject, name, {"base": base}, compiled)]


def _rows(subject: Any, name: str, tasks: Mapping[str, Callable[[], Any]], compiled: Any) -> list[dict[str, Any]]:
    device, options = subject.device, subject.options

    def timed(task: str, stopwatch: Stopwatch) -> None:
        stopwatch.time(task, tasks[task])

    sides: list[Callable[[Stopwatch], None]] = [partial(subject.time_dense_run, name) for name in subject.dense]
    sides += [partial(timed, task) for task in tasks]
    stopwatch = alternate(sides, repeats=options.repeats, warmup=options.warmup, device=device)
    subject.pipe.unet = compiled
    return [
        {
            "row": f"editor, {name}",
            "task": task,
            "model": subject.name,
            "image": f"{subject.side}x{subject.side}",
            "steps": subject.steps,
            "baseline": baseline,
            **stopwatch[baseline].as_dict("baseline"),
            **stopwatch[task].as_dict("editor"),
            "ratio": round(stopwatch[baseline].median_ms / stopwatch[task].median_ms, 3),
        }
        for task in tasks
        for baseline in subject.dense
    ]


def _since(start: float, device: torch.device) -> float:
    return round(_now(device) - start, 3)


def draw(rows: list[dict[str, Any]]) -> Table:
    """The rows as a table for people."""
    table = Table(title="by Editors", caption="median ± interquartile range; ratio = baseline / editor")
    columns = (
        "model", "steps", "mask", "row", "task", "baseline", "baseline ms", "editor ms", "ratio", "dense call ms",
        "mean call ms",
    )  # fmt: skip
    for column in columns:
        table.add_column(column, justify="left" if column in ("model", "row", "task", "baseline") else "right")
    for row in rows:
        table.add_row(
            row["model"],
            str(row["steps"]),
            f"{row['mask_fraction']:.1%}" if "mask_fraction" in row else "",
            row["row"] if row["refused"] is None else f"{row['row']} (refused: eager)",
            row["task"],
            row["baseline"],
            *(f"{row[f'{side}_ms']:.0f} ± {row[f'{side}_iqr_ms']:.0f}" for side in ("baseline", "editor")),
            f"{row['ratio']:.2f}x",
            f"{row['baseline_call_ms']:.2f}",
            f"{row['mean_call_ms']:.2f}" if "mean_call_ms" in row else "",
        )
    return table
