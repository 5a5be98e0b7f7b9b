"""Step latency of full-size UNets on a GPU: ``python -m benchmarks.step_latency --device cuda --models sd21 sdxl``.

A run of a few calls is recorded. Then, for every mask area, three things are timed in turn: the eager model, the same
model under ``torch.compile(mode="reduce-overhead", fullgraph=True)`` in its fastest form (``dense_forms.py``), and a
sparse edit run. All times are of whole calls, wall clock, the GPU's queue empty before and after; ``*_gpu_ms`` is the
replay of the CUDA graph alone. Weights are random. Above the break-even the edit run's calls are dense ones, compiled
as well (``kind`` says so), and ``--dense-above 1`` measures sparse calls there. Options and the choice between this and
the small model live in ``step_latency.py``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.support.dense_forms import STRONGEST, compiled_unet
from benchmarks.support.harness import (
    Kernel,
    Report,
    Stopwatch,
    alternate,
    forget_compiled,
    largest_error,
    machine,
    profile_kernels,
    replay_times,
    versions,
)
from benchmarks.support.peers import Peer, prepare_peers
from benchmarks.support.subjects import UNETS, Prompt, Run, moved_mask, random_unet, square_mask

MODELS = tuple(UNETS)
FRACTIONS = (0.02, 0.05, 0.15, 0.30, 0.60, 1.00)
PROFILED = 0.05
EAGER, COMPILED = "eager", "compiled"


@dataclass
class Subject:
    """One model in its three forms, and its recorded run; ``kind`` tells how the calls of the last edit run ran."""

    name: str
    run: Run
    eager: torch.nn.Module
    dense: Callable[..., Any]
    sparse: Any
    recording: Any
    base: list[torch.Tensor]
    facts: dict[str, float] = field(default_factory=dict)
    peers: list[Peer] = field(default_factory=list)
    kind: str = ""

    @property
    def device(self) -> torch.device:
        return self.run.samples[0].device

    def edit(self, mask: torch.Tensor, prompt: Prompt, stopwatch: Stopwatch | None = None) -> list[torch.Tensor]:
        """One edit run; ``stopwatch`` files its first call as ``first`` and the others as ``sparse``."""
        stopwatch = stopwatch or Stopwatch(self.device)
        samples = self.run.edited_samples(mask)
        with self.sparse.edit(self.recording, mask=mask) as session:
            outputs = [
                stopwatch.time("sparse" if call else "first", partial(self._call, call, samples, prompt))
                for call in range(self.run.calls)
            ]
        self.kind = session.timings[-1][0]
        return outputs

    def replay_ms(self, mask: torch.Tensor, prompt: Prompt) -> float | None:
        """What the CUDA graphs of a call take, without the host; see :func:`replay_ms`."""
        samples = self.run.edited_samples(mask)
        with self.sparse.edit(self.recording, mask=mask):
            return replay_ms(
                [partial(self._call, call, samples, prompt) for call in range(self.run.calls)], self.device
            )

    def first_finished_call(self, mask: torch.Tensor, prompt: Prompt) -> float:
        """Seconds from a mask never seen before to the first finished call of its edit run."""
        samples = self.run.edited_samples(mask)
        _synchronize(self.device)
        start = time.perf_counter()
        with self.sparse.edit(self.recording, mask=mask):
            self._call(0, samples, prompt)
            _synchronize(self.device)
            elapsed = time.perf_counter() - start
            for call in range(1, self.run.calls):
                self._call(call, samples, prompt)
        return elapsed

    def identity_error(self, mask: torch.Tensor) -> float:
        """How far an edit that changes nothing is from the recorded outputs, relative to their largest value."""
        with self.sparse.edit(self.recording, mask=mask):
            outputs = [self._call(call, self.run.samples, self.run.prompt) for call in range(self.run.calls)]
        return largest_error(outputs, self.base)

    def _call(self, call: int, samples: list[torch.Tensor], prompt: Prompt) -> torch.Tensor:
        return self.run.dense(self.sparse, call, samples, prompt)


def prepare_subject(
    name: str, device: torch.device, dtype: torch.dtype, config: Any, calls: int, form: str = STRONGEST
) -> Subject:
    """Build, compile and record one model. Times of that are in ``facts``, in seconds."""
    from fisedit_compiler import sparsify

    unet = random_unet(name, device, dtype)
    run = Run(unet, calls=calls)
    facts: dict[str, float] = {"parameters": sum(parameter.numel() for parameter in unet.parameters())}

    start = time.perf_counter()
    sparse = sparsify(unet, config)
    facts["sparsify_s"] = round(time.perf_counter() - start, 2)
    with sparse.record() as recording:
        base = [run.dense(sparse, call, run.samples, run.prompt) for call in range(calls)]
    facts["recording_gib_per_call"] = round(recording.nbytes / calls / 2**30, 3)

    start = time.perf_counter()
    dense = compiled_unet(unet, form)
    # The first call compiles, the second records a CUDA graph, the third is the first that replays it.
    for _ in range(4):
        run.dense(dense, 0, run.samples, run.prompt)
    _synchronize(device)
    facts["dense_compile_s"] = round(time.perf_counter() - start, 2)
    return Subject(name, run, unet, dense, sparse, recording, base, facts)


def measure(subject: Subject, fraction: float, *, repeats: int, warmup: int) -> list[dict[str, Any]]:
    """The rows of one mask area, one a baseline."""
    from fisedit_compiler.runtime.sessions.fallback import dense_reason

    run, device = subject.run, subject.device
    mask = square_mask(fraction, run.height, run.width).to(device)
    samples = run.edited_samples(mask)
    graphs = _compiled_graphs()
    prompt = run.new_prompt()
    new_bucket = subject.first_finished_call(mask, prompt)
    # The very first sparse call compiles, and the very first dense one; no other may.
    falls_back = dense_reason(mask, subject.sparse.sparsify_config, subject.recording.device) is not None
    first = "fallback_first_call_s" if falls_back else "first_call_s"
    recompiles = _compiled_graphs() - graphs if first in subject.facts else 0
    subject.facts.setdefault(first, round(new_bucket, 2))
    graphs = _compiled_graphs()
    moved = moved_mask(mask, 8)
    new_mask = None if moved is None else round(subject.first_finished_call(moved, prompt), 4)
    recompiles += _compiled_graphs() - graphs

    def eager(stopwatch: Stopwatch) -> None:
        stopwatch.time(EAGER, lambda: run.dense(subject.eager, 0, samples, prompt))

    def compiled(stopwatch: Stopwatch) -> None:
        stopwatch.time(COMPILED, lambda: run.dense(subject.dense, 0, samples, prompt))

    def sparse(stopwatch: Stopwatch) -> None:
        # A prompt never seen before: its first call also computes what depends on the prompt alone.
        subject.edit(mask, run.new_prompt(), stopwatch)

    others = [partial(peer.time, run, samples, prompt) for peer in subject.peers]
    stopwatch = alternate([eager, compiled, sparse, *others], repeats=repeats, warmup=warmup, device=device)
    baselines = {EAGER: stopwatch[EAGER], COMPILED: stopwatch[COMPILED]}
    baselines |= {peer.name: peer.timing(stopwatch) for peer in subject.peers}
    gpu = {
        EAGER: None,
        COMPILED: replay_ms([lambda: run.dense(subject.dense, 0, samples, prompt)], device),
        "sparse": subject.replay_ms(mask, prompt),
    }
    identity_error = subject.identity_error(mask)
    rows = []
    for baseline, timing in baselines.items():
        rows.append(
            {
                "model": subject.name,
                "image": f"{8 * run.height}x{8 * run.width}",
                "mask_fraction": round(mask.float().mean().item(), 4),
                "requested_fraction": fraction,
                "kind": subject.kind,
                "baseline": baseline,
                **timing.as_dict("baseline"),
                **stopwatch["sparse"].as_dict("sparse"),
                "ratio": round(timing.median_ms / stopwatch["sparse"].median_ms, 3),
                "baseline_gpu_ms": gpu.get(baseline),
                "sparse_gpu_ms": gpu["sparse"],
                **stopwatch["first"].as_dict("sparse_first_call"),
                "new_bucket_s": round(new_bucket, 4),
                "new_mask_s": new_mask,
                "recompiles": recompiles,
                "identity_error": round(identity_error, 6),
                **subject.facts,
            }
        )
    return rows


def replay_ms(calls: Iterable[Callable[[], Any]], device: torch.device) -> float | None:
    """Median, over the calls, of the milliseconds of all CUDA graphs that one replays; ``None`` if none does."""
    if device.type != "cuda":
        return None
    sums = []
    for call in calls:
        with replay_times() as times:
            call()
        sums += [sum(times)] if times else []
    return round(statistics.median(sums), 3) if sums else None


def profile(subject: Subject, path: Path) -> None:
    """Append the kernel list of a sparse call at 5 % to a text file. The first call of the edit is not in it."""
    mask = square_mask(PROFILED, subject.run.height, subject.run.width).to(subject.device)
    prompt = subject.run.new_prompt()
    samples = subject.run.edited_samples(mask)
    calls = subject.run.calls - 1
    subject.edit(mask, prompt)
    with subject.sparse.edit(subject.recording, mask=mask):
        subject._call(0, samples, prompt)
        kernels = profile_kernels(lambda: [subject._call(call, samples, prompt) for call in range(1, calls + 1)], calls)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(kernel_list(f"{subject.name}, {PROFILED:.0%} mask", kernels))


def kernel_list(title: str, kernels: Iterable[Kernel]) -> str:
    """Kernels as lines of text: launches a call, microseconds a launch and a call, name."""
    listed = list(kernels)
    launches, total = sum(k.launches for k in listed), sum(k.microseconds for k in listed)
    lines = [f"{title}: {launches:.0f} launches, {total / 1e3:.3f} ms a call", "  launches   us each   us/call  name"]
    lines += [f"{k.launches:10.1f}{k.microseconds / k.launches:10.2f}{k.microseconds:10.1f}  {k.name}" for k in listed]
    return "\n".join(lines) + "\n\n"


def draw(rows: list[dict[str, Any]]) -> Table:
    """The rows as a table for people."""
    table = Table(title="step latency", caption="median ± interquartile range; ratio = baseline / sparse")
    for column in ("model", "mask", "runs", "baseline", "baseline ms", "sparse ms", "gpu ms", "ratio", "new mask s"):
        table.add_column(column, justify="left" if column in ("model", "runs", "baseline") else "right")
    for row in rows:
        table.add_row(
            row["model"],
            f"{row['mask_fraction']:.1%}",
            row["kind"],
            row["baseline"],
            *(f"{row[f'{name}_ms']:.2f} ± {row[f'{name}_iqr_ms']:.2f}" for name in ("baseline", "sparse")),
            "-" if row["sparse_gpu_ms"] is None else f"{row['sparse_gpu_ms']:.2f}",
            f"{row['ratio']:.2f}x",
            "-" if row["new_mask_s"] is None else f"{row['new_mask_s']:.2f}",
        )
    return table


def measure_models(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Report:
    """Measure every model and area; print each row and write the JSON as soon as it is known."""
    from fisedit_compiler import SparsifyConfig

    config = SparsifyConfig(
        norm=options.norm, attention=options.attention, backend=options.backend, dense_above=options.dense_above
    )
    settings = {
        "models": options.models,
        "fractions": options.fractions,
        "calls": options.calls,
        "batch": 2,
        "dtype": str(dtype).removeprefix("torch."),
        "norm": options.norm,
        "attention": options.attention,
        "backend": config.backend_on(device.type),
        "backend_asked": options.backend,
        "dense_above": options.dense_above,
        "dense_form": options.dense_form,
        "repeats": options.repeats,
        "warmup": options.warmup,
    }
    rows: list[dict[str, Any]] = []
    report = Report("step_latency", settings, machine(device), versions(), rows)
    for name in options.models:
        print(f"{name}: building and compiling", flush=True)
        with torch.no_grad():
            subject = prepare_subject(name, device, dtype, config, options.calls, options.dense_form)
            print(f"{name}: {subject.facts}", flush=True)
            if options.peers:
                subject.peers = prepare_peers(subject.eager, subject.run)
                settings["peers"] = {peer.name: peer.note for peer in subject.peers}
            for fraction in options.fractions:
                for row in measure(subject, fraction, repeats=options.repeats, warmup=options.warmup):
                    rows.append(row)
                    print({key: value for key, value in row.items() if key not in subject.facts}, flush=True)
                if options.json is not None:
                    report.write(options.json)
            if any(executable.backend.refused for executable in subject.sparse._programs.executables()):
                settings["backend"] = "eager"
            if options.profile is not None:
                profile(subject, options.profile)
        print(f"{name}: {subject.facts}", flush=True)
        del subject
        forget_compiled(device)
    report.publish(draw(rows), options.json)
    return report


def _compiled_graphs() -> int:
    """Graphs that torch.compile has compiled in this process so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
