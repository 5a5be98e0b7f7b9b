"""What does each idea contribute to a fast sparse step? The five rows of FISEdit's ablation, in one run.

The rows follow Yu et al., *Accelerating Text-to-Image Editing via Cache-Enabled Sparse Diffusion Inference* (AAAI
2024), each adding one idea to the row before: vanilla, fast kernels, sparse convolution with blocks of one fixed size,
adaptive block sizes, approximate attention. The last row is the compiler's default. Sparse rows always normalise with
recorded statistics; the two without approximate attention gather every site for every attention (queries, keys and
values) and attend densely. By default the embedded model is measured, with ``--models`` full-size UNets with random
weights.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: make the repository's root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.table import Table

from benchmarks.step_latency import area
from benchmarks.support.dense_forms import compiled_unet
from benchmarks.support.harness import (
    Report,
    Stopwatch,
    alternate,
    argument_parser,
    forget_compiled,
    largest_error,
    machine,
    positive,
    prepare,
    versions,
)
from benchmarks.support.subjects import UNETS, Run, random_unet, square_mask

EMBEDDED = "emoji-scenes"
MODELS = (EMBEDDED, *UNETS)
FRACTIONS = (0.05, 0.15)

VANILLA, FAST = "vanilla", "+ fast kernels"
DENSE_NOTES: dict[str, tuple[str, str]] = {
    "cuda": (
        "eager diffusers",
        'torch.compile(mode="reduce-overhead", fullgraph=True) of the dense UNet in channels_last',
    ),
    "cpu": ("eager diffusers with AttnProcessor", "eager diffusers with AttnProcessor2_0, torch's fused attention"),
}
"""What the two dense rows are, by type of device. Other devices have the CPU's."""

_DENSE_ATTENTION = frozenset({"self_attention", "cross_attention"})
SPARSE_ROWS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("+ sparse convolution, fixed blocks", {"block_size": 4, "disabled_passes": _DENSE_ATTENTION}),
    ("+ adaptive blocks", {"block_size": None, "disabled_passes": _DENSE_ATTENTION}),
    ("+ approximate attention", {"block_size": None}),
)
"""The sparse rows: name, and the arguments of ``SparsifyConfig`` that make it."""


@dataclass
class Sparse:
    """One sparse row: the compiled model and its recorded run."""

    name: str
    note: str
    compiled: Any
    recording: Any
    base: list[torch.Tensor]
    facts: dict[str, Any]

    def edit(self, run: Run, mask: torch.Tensor, stopwatch: Stopwatch) -> None:
        """One edit with a prompt never seen before; every call but the first is filed under the row's name.

        The first call also computes what depends on the prompt alone.
        """
        samples, prompt = run.edited_samples(mask), run.new_prompt()
        with self.compiled.edit(self.recording, mask=mask):
            run.dense(self.compiled, 0, samples, prompt)
            for call in range(1, run.calls):
                stopwatch.time(self.name, partial(run.dense, self.compiled, call, samples, prompt))

    def identity_error(self, run: Run, mask: torch.Tensor) -> float:
        """How far an edit that changes nothing is from the recorded outputs, relative to their largest value."""
        with self.compiled.edit(self.recording, mask=mask):
            outputs = [run.dense(self.compiled, call, run.samples, run.prompt) for call in range(run.calls)]
        return largest_error(outputs, self.base)


@dataclass
class Subject:
    """One model: its two dense rows, as functions of samples and prompt, and its sparse ones."""

    name: str
    image: str
    run: Run
    dense: dict[str, Callable[..., Any]]
    sparse: list[Sparse]
    failed: list[str] = field(default_factory=list)


def shown(arguments: Mapping[str, Any]) -> str:
    """Arguments as a row's note: sets in order, the adaptive block size by its name."""
    texts = {name: sorted(value) if isinstance(value, frozenset) else value for name, value in arguments.items()}
    if "block_size" in texts:
        texts["block_size"] = texts["block_size"] or "adaptive"
    return ", ".join(f"{name}={text}" for name, text in texts.items())


def load(name: str, device: torch.device, dtype: torch.dtype) -> tuple[torch.nn.Module, int, int]:
    """A UNet, the pixels along a side of one of its sites, and the length of its text."""
    if name in UNETS:
        return random_unet(name, device, dtype), 8, 77
    from fisedit_compiler.models import load_pipeline

    pipe = load_pipeline(device=device, dtype=dtype)
    return pipe.unet.eval(), pipe.vae_scale_factor, pipe.tokenizer.model_max_length


def dense_rows(unet: torch.nn.Module, run: Run) -> dict[str, Callable[..., Any]]:
    """The two dense rows, warm."""
    device = run.samples[0].device
    vanilla: Callable[..., Any] = unet
    fast: Callable[..., Any] = unet
    if device.type == "cuda":
        fast = compiled_unet(unet)
    else:
        from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

        plain: Any = copy.deepcopy(unet)
        plain.set_attn_processor(AttnProcessor())
        vanilla = plain
        fused: Any = unet
        fused.set_attn_processor(AttnProcessor2_0())
    # The first call compiles, the second records a CUDA graph, the third is the first that replays it.
    for _ in range(4 if device.type == "cuda" else 1):
        run.dense(fast, 0, run.samples, run.prompt)
    return {VANILLA: vanilla, FAST: fast}


def sparse_row(name: str, arguments: Mapping[str, Any], unet: torch.nn.Module, run: Run) -> Sparse:
    """Compile and record one sparse row."""
    from fisedit_compiler import SparsifyConfig, sparsify

    backend = "inductor" if run.samples[0].is_cuda else "eager"
    start = time.perf_counter()
    # A row that falls back to dense calls would say nothing about its idea.
    compiled = sparsify(unet, SparsifyConfig(**{"backend": backend, "dense_above": 1.0, **arguments}))
    seconds = time.perf_counter() - start
    with compiled.record() as recording:
        base = [run.dense(compiled, call, run.samples, run.prompt) for call in range(run.calls)]
    facts = {
        "sparsify_s": round(seconds, 2),
        "dense_operations": sum(len(program.refusals) for program in compiled.programs),
        "recording_gib_per_call": round(recording.nbytes / run.calls / 2**30, 3),
    }
    return Sparse(name, shown(arguments), compiled, recording, base, facts)


def prepare_subject(options: argparse.Namespace, name: str, device: torch.device, dtype: torch.dtype) -> Subject:
    """Build one model in all its rows. A row that cannot be built is printed and left out."""
    unet, pixels, tokens = load(name, device, dtype)
    run = Run(unet, calls=options.calls, tokens=tokens, size=options.size)
    # Compiled for sparse calls first: what the dense rows do to the module must not be in the captured graph.
    subject = Subject(name, f"{pixels * run.height}x{pixels * run.width}", run, {}, [])
    for row, arguments in SPARSE_ROWS:
        print(f"{name}: compiling and recording {row!r}", flush=True)
        try:
            subject.sparse.append(sparse_row(row, arguments, unet, run))
        except Exception:
            _leave_out(subject, row)
    print(f"{name}: preparing the dense rows", flush=True)
    subject.dense.update(dense_rows(unet, run))
    return subject


def measure(subject: Subject, fraction: float, *, repeats: int, warmup: int) -> list[dict[str, Any]]:
    """The rows of one mask area, timed in turn."""
    run = subject.run
    device = run.samples[0].device
    mask = square_mask(fraction, run.height, run.width).to(device)
    samples = run.edited_samples(mask)
    working, errors = [], {}
    for sparse in subject.sparse:
        # The first edit with a mask may compile; it is not timed.
        try:
            errors[sparse.name] = sparse.identity_error(run, mask)
            working.append(sparse)
        except Exception:
            _leave_out(subject, f"{sparse.name} at {fraction:.0%}")

    def dense_side(name: str, unet: Callable[..., Any]) -> Callable[[Stopwatch], None]:
        return lambda stopwatch: stopwatch.time(name, lambda: run.dense(unet, 0, samples, run.prompt))

    def sparse_side(sparse: Sparse) -> Callable[[Stopwatch], None]:
        return lambda stopwatch: sparse.edit(run, mask, stopwatch)

    sides = [dense_side(name, unet) for name, unet in subject.dense.items()] + [sparse_side(item) for item in working]
    stopwatch = alternate(sides, repeats=repeats, warmup=warmup, device=device)

    notes = dict(zip((VANILLA, FAST), DENSE_NOTES.get(device.type, DENSE_NOTES["cpu"]), strict=True))
    rows: list[dict[str, Any]] = []
    vanilla = previous = stopwatch[VANILLA].median_ms
    for name, note, facts in [
        *((name, notes[name], {}) for name in subject.dense),
        *((item.name, item.note, {"identity_error": round(errors[item.name], 6), **item.facts}) for item in working),
    ]:
        timing = stopwatch[name]
        rows.append(
            {
                "model": subject.name,
                "image": subject.image,
                "mask_fraction": round(mask.float().mean().item(), 4),
                "requested_fraction": fraction,
                "row": name,
                "note": note,
                **timing.as_dict("row"),
                "baseline": VANILLA,
                **stopwatch[VANILLA].as_dict("baseline"),
                "ratio": round(vanilla / timing.median_ms, 3),
                "ratio_to_previous": round(previous / timing.median_ms, 3),
                **facts,
            }
        )
        previous = timing.median_ms
    return rows


def draw(rows: list[dict[str, Any]]) -> Table:
    """The rows as a table for people."""
    table = Table(title="ablation", caption="median ± interquartile range of one UNet call; ratio = vanilla / row")
    for column in ("model", "mask", "row", "ms", "ratio", "to the row above"):
        table.add_column(column, justify="left" if column in ("model", "row") else "right")
    for row in rows:
        table.add_row(
            row["model"],
            f"{row['mask_fraction']:.1%}",
            row["row"],
            f"{row['row_ms']:.2f} ± {row['row_iqr_ms']:.2f}",
            f"{row['ratio']:.2f}x",
            "-" if row["row"] == VANILLA else f"{row['ratio_to_previous']:.2f}x",
        )
    return table


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argument_parser(str(__doc__).splitlines()[0], repeats=10)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[EMBEDDED], help="full-size ones: on a GPU")
    parser.add_argument("--fractions", type=area, nargs="+", metavar="F", default=list(FRACTIONS), help="mask areas")
    parser.add_argument("--calls", type=positive, default=3, help="UNet calls of the recorded run")
    parser.add_argument("--size", type=positive, help="sites along a side of the latents; default: the model's")
    parser.add_argument("--warmup", type=positive, default=2, help="untimed repeats before the timed ones")
    options = parser.parse_args(arguments)
    if options.calls < 2:
        parser.error("--calls must be at least 2: the first call of an edit is left out of the times")
    return options


def main(arguments: list[str] | None = None) -> Report:
    """Run the benchmark, print and write its report.

    Raises:
        SystemExit: a row could not be measured; the report of the others is written first.
    """
    options = parse(arguments)
    device, dtype = prepare(options)
    settings = {
        "models": options.models,
        "fractions": options.fractions,
        "calls": options.calls,
        "batch": 2,
        "size": options.size,
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": options.repeats,
        "warmup": options.warmup,
    }
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    report = Report("ablation", settings, machine(device), versions(), rows)
    for name in options.models:
        with torch.no_grad():
            subject = prepare_subject(options, name, device, dtype)
            for fraction in options.fractions:
                for row in measure(subject, fraction, repeats=options.repeats, warmup=options.warmup):
                    rows.append(row)
                    print(row, flush=True)
                if options.json is not None:
                    report.write(options.json)
        failed += subject.failed
        del subject
        forget_compiled(device)
    report.publish(draw(rows), options.json)
    if failed:
        raise SystemExit(f"left out, with the errors printed above: {', '.join(failed)}")
    return report


def _leave_out(subject: Subject, row: str) -> None:
    traceback.print_exc()
    print(f"{subject.name}: row {row!r} is left out", file=sys.stderr, flush=True)
    subject.failed.append(f"{subject.name} {row}")


if __name__ == "__main__":
    main()
