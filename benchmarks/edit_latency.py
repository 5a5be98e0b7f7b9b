"""How long does a user wait for a whole edit, text encoder, all steps and VAE included, by mask area?

A base image is made and recorded once. Then, for every mask, edits with prompts never seen before are timed in turn,
wall clock from the prompt to the PIL image: the stock pipeline that runs the new prompt from the base's noise (eager,
and with a UNet under torch.compile in its fastest form), the same pipeline inside ``compiled.edit()``, and
``Editor.edit()``. Every run is made twice: once untouched, for the time of the whole, and once with the queue of the
GPU drained around its parts, for the share of each. By default the embedded model is measured, with ``--models``
Stable Diffusion's architectures with random weights, and ``--peers`` adds other projects' UNets as dense baselines.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: make the repository's root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.table import Table

from benchmarks import editors
from benchmarks.step_latency import area
from benchmarks.support.harness import (
    Report,
    Stopwatch,
    alternate,
    argument_parser,
    forget_compiled,
    machine,
    prepare,
    versions,
)
from benchmarks.support.peers import in_pipeline
from benchmarks.support.subjects import moved_mask
from benchmarks.support.whole_runs import (
    BASE_PROMPT,
    EAGER,
    WholeRuns,
    add_baselines,
    add_run_options,
    load_runs,
    noted,
)

FRACTIONS = (0.05, 0.15, 0.30)
SPARSE, EDITOR = "sparse", "editor"
PARTS = ("enter", "text", "unet", "vae", "rest")
"""What a run is made of: entering ``edit()`` (which checks the weights), the text encoder, the UNet's calls, the
VAE's decoder, and everything else (tokenizer, scheduler, guidance, the picture's conversion)."""


@dataclass
class Subject(WholeRuns):
    """One pipeline, its UNet in its forms, and its recorded base; ``kind`` tells how the last edit's calls ran."""

    sparse: Any = None
    editor: Any = None
    base: Any = None
    kind: str = ""

    def time_dense(self, name: str, stopwatch: Stopwatch) -> None:
        """One run of a dense baseline, whole and another in parts."""
        self.time_dense_run(name, stopwatch)
        with in_pipeline(self.pipe, self.dense[name]):
            self._file_parts(name, stopwatch, lambda stack, parts: self.run_timed(parts, next(self.prompts)))

    def time_sparse(self, mask: torch.Tensor, stopwatch: Stopwatch) -> None:
        """One edit of the stock pipeline, whole and in parts."""
        stopwatch.time(SPARSE, partial(self.edit, mask))

        def edit(stack: ExitStack, parts: Stopwatch) -> None:
            self.pipe.unet = self.sparse
            mode = self.sparse.edit(self.base.recording, mask=mask, record=self.options.record)
            parts.time("enter", partial(stack.enter_context, mode))
            self.run_timed(parts, next(self.prompts))

        self._file_parts(SPARSE, stopwatch, edit)

    def time_editor(self, mask: torch.Tensor, stopwatch: Stopwatch) -> None:
        """One edit through the Editor."""
        stopwatch.time(EDITOR, partial(self.edit_with_editor, mask))

    def edit(self, mask: torch.Tensor) -> Any:
        """One edit of the stock pipeline with a new prompt; a PIL image."""
        self.pipe.unet = self.sparse
        with self.sparse.edit(self.base.recording, mask=mask, record=self.options.record) as session:
            image = self.run(next(self.prompts))
        self.kind = session.timings[-1][0]
        return image

    def edit_with_editor(self, mask: torch.Tensor) -> Any:
        """One edit through the Editor with a new prompt; a ``fisedit_compiler.pipelines.Edit``."""
        self.pipe.unet = self.sparse
        return self.editor.edit(self.base, next(self.prompts), mask=mask, record=self.options.record)

    def run_timed(self, parts: Stopwatch, prompt: str) -> None:
        """:meth:`run`, the time of each part filed under its name."""
        unet = self.pipe.unet
        try:
            self.pipe.unet = _TimedUNet(unet, parts)
            with (
                _timed_method(self.pipe.text_encoder, "forward", "text", parts),
                _timed_method(self.pipe.vae, "decode", "vae", parts),
            ):
                self.run(prompt)
        finally:
            self.pipe.unet = unet

    def _file_parts(self, name: str, stopwatch: Stopwatch, function: Callable[[ExitStack, Stopwatch], None]) -> None:
        """Run ``function`` and file the sum of every part's times under ``{name}.{part}``."""
        parts = Stopwatch(self.device)
        parts.add("enter", 0.0)

        def whole() -> None:
            with ExitStack() as stack:
                function(stack, parts)

        parts.time("rest", whole)
        sums = {part: sum(parts[part].samples_ms) for part in PARTS}
        sums["rest"] -= sum(sums[part] for part in PARTS if part != "rest")
        for part, milliseconds in sums.items():
            stopwatch.add(f"{name}.{part}", milliseconds)


class _TimedUNet:
    """Stands for a UNet in a pipeline and files the time of its calls.

    A hook or a patched method would be seen by torch.compile. The pipeline finds its device by its other parts.
    """

    def __init__(self, unet: Any, stopwatch: Stopwatch) -> None:
        self._unet, self._stopwatch = unet, stopwatch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._stopwatch.time("unet", partial(self._unet, *args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._unet, name)


@contextmanager
def _timed_method(owner: Any, method: str, name: str, stopwatch: Stopwatch) -> Iterator[None]:
    """Inside the block, calls of ``owner.method`` are filed under ``name``."""
    original = getattr(owner, method)

    def timed(*args: Any, **kwargs: Any) -> Any:
        return stopwatch.time(name, partial(original, *args, **kwargs))

    setattr(owner, method, timed)
    try:
        yield
    finally:
        delattr(owner, method)


def prepare_subject(
    name: str, options: argparse.Namespace, device: torch.device, dtype: torch.dtype, notes: dict[str, str]
) -> Subject:
    """Build a pipeline, record the base, compile its UNet. Times of that are in ``facts``, in seconds.

    Args:
        name: of the pipeline.
        options: of the command line.
        device: where it runs.
        dtype: of its weights.
        notes: gets those on peers, by their names.

    Raises:
        SystemExit: the base's latents are not finite, so nothing could be compared with them.
    """
    from fisedit_compiler import Editor, SparsifyConfig

    subject = load_runs(Subject, name, options, device, dtype)
    config = SparsifyConfig(backend="inductor" if device.type == "cuda" else "eager")
    subject.editor = Editor(subject.pipe, config)
    with subject.fact("sparsify_s"):
        subject.sparse = subject.editor.compiled
    with subject.fact("base_s"):
        subject.base = subject.editor.generate(BASE_PROMPT, **subject.settings)
    if not all(bool(torch.isfinite(latents).all()) for latents in subject.base.latents):
        raise SystemExit(f"{name}: the base's latents are not finite in {dtype}; choose another --dtype")
    subject.facts["unet_calls"] = subject.base.recording.num_calls
    subject.facts["recording_gib"] = round(subject.base.recording.nbytes / 2**30, 3)
    notes |= add_baselines(subject)
    return subject


def measure(subject: Subject, fraction: float) -> list[dict[str, Any]]:
    """The rows of one mask area, one a baseline."""
    options, device = subject.options, subject.device
    mask = subject.mask(fraction)
    firsts: dict[str, Any] = {"new_mask_s": None}
    # The first mask of its size may compile and captures its CUDA graph; a moved one finds both there.
    with noted(firsts, "first_edit_s", device):
        subject.edit(mask)
    moved = moved_mask(mask, 8)
    if moved is not None:
        with noted(firsts, "new_mask_s", device):
            subject.edit(moved)
    unchanged = subject.edit_with_editor(mask).unchanged_outside

    sides = [partial(subject.time_dense, name) for name in subject.dense]
    sides += [partial(subject.time_sparse, mask), partial(subject.time_editor, mask)]
    stopwatch = alternate(sides, repeats=options.repeats, warmup=options.warmup, device=device)

    def parts(name: str, prefix: str) -> dict[str, float]:
        return {f"{prefix}_{part}_ms": round(stopwatch[f"{name}.{part}"].median_ms, 3) for part in PARTS}

    return [
        {
            "model": subject.name,
            "image": f"{subject.side}x{subject.side}",
            "steps": subject.steps,
            "mask_fraction": round(mask.float().mean().item(), 4),
            "requested_fraction": fraction,
            "kind": subject.kind,
            "baseline": baseline,
            **stopwatch[baseline].as_dict("baseline"),
            **stopwatch[SPARSE].as_dict("sparse"),
            **stopwatch[EDITOR].as_dict("editor"),
            "ratio": round(stopwatch[baseline].median_ms / stopwatch[SPARSE].median_ms, 3),
            "editor_ratio": round(stopwatch[baseline].median_ms / stopwatch[EDITOR].median_ms, 3),
            "unet_ratio": round(stopwatch[f"{baseline}.unet"].median_ms / stopwatch[f"{SPARSE}.unet"].median_ms, 3),
            **parts(baseline, "baseline"),
            **parts(SPARSE, "sparse"),
            **firsts,
            "unchanged_outside": unchanged,
            **subject.facts,
        }
        for baseline in subject.dense
    ]


def draw(rows: list[dict[str, Any]]) -> Table:
    """The rows as two tables for people, one below the other: the wait, and where it goes."""
    wait = Table(title="a whole edit", caption="median ± interquartile range; ratio = baseline / sparse")
    names = ("model", "steps", "mask", "runs", "baseline", "baseline ms", "sparse ms", "Editor ms", "ratio")
    for column in names:
        wait.add_column(column, justify="left" if column in ("model", "runs", "baseline") else "right")
    shares = Table(title="where the time goes, ms", caption="medians of runs with the queue drained around each part")
    for column in ("model", "mask", "run", *PARTS):
        shares.add_column(column, justify="left" if column in ("model", "run") else "right")
    for row in rows:
        mask = f"{row['mask_fraction']:.1%}"
        wait.add_row(
            row["model"],
            str(row["steps"]),
            mask,
            row["kind"],
            row["baseline"],
            *(f"{row[f'{name}_ms']:.0f} ± {row[f'{name}_iqr_ms']:.0f}" for name in ("baseline", SPARSE, EDITOR)),
            f"{row['ratio']:.2f}x",
        )
        runs = [(row["baseline"], "baseline")]
        if row["baseline"] == EAGER:
            runs.insert(0, (SPARSE, "sparse"))
        for name, prefix in runs:
            shares.add_row(row["model"], mask, name, *(f"{row[f'{prefix}_{part}_ms']:.1f}" for part in PARTS))
    both = Table.grid()
    both.add_row(wait)
    both.add_row(shares)
    return both


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argument_parser(str(__doc__).splitlines()[0], repeats=5)
    add_run_options(parser)
    parser.add_argument("--fractions", type=area, nargs="+", metavar="F", default=list(FRACTIONS), help="mask areas")
    parser.add_argument("--record", action="store_true", help="record the edits too, as the Editor does by default")
    editors.add_options(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> Report:
    """Run the benchmark, print and write its report."""
    options = parse(arguments)
    device, dtype = prepare(options)
    peers: dict[str, str] = {}
    settings = {
        "models": options.models,
        "fractions": options.fractions,
        "guidance": options.guidance,
        "scheduler": options.scheduler,
        "dtype": str(dtype).removeprefix("torch."),
        "record": options.record,
        "repeats": options.repeats,
        "warmup": options.warmup,
        "peers": peers,
    }
    rows: list[dict[str, Any]] = []
    by_editors: list[dict[str, Any]] = []
    report = Report("edit_latency", settings, machine(device), versions(), rows)
    for name in options.models:
        print(f"{name}: building and recording", flush=True)
        subject = prepare_subject(name, options, device, dtype, peers)
        print(f"{name}: {subject.facts}", flush=True)
        for fraction in [] if options.only_editors else options.fractions:
            for row in measure(subject, fraction):
                rows.append(row)
                print({key: value for key, value in row.items() if key not in subject.facts}, flush=True)
            if options.json is not None:
                report.write(options.json)
        subject.editor.close()
        if options.as_it_comes:
            # Its recording first: each of the others makes one.
            subject.base = subject.sparse = subject.editor = None
            for found in editors.measure(subject, subject.dense[EAGER], BASE_PROMPT, subject.settings):
                by_editors += found
                print(*found, sep="\n", flush=True)
                if options.json is not None:
                    replace(report, rows=[*rows, *by_editors]).write(options.json)
        del subject
        forget_compiled(device)
    tables = Table.grid()
    if rows:
        tables.add_row(draw(rows))
    if by_editors:
        tables.add_row(editors.draw(by_editors))
        rows += by_editors
    report.publish(tables, options.json)
    return report


if __name__ == "__main__":
    main()
