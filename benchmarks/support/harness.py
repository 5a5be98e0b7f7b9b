"""What every benchmark shares: describing the machine, timing side by side, printing and writing the result.

No question about the compiler is answered here; each question has a module of its own beside this one.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fisedit_compiler.evaluation.results import environment

LIBRARIES = ("fisedit-compiler", "torch", "triton", "diffusers", "transformers", "numpy")


@dataclass(frozen=True)
class Timing:
    """Repeated wall-clock times of one thing, in milliseconds."""

    samples_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples_ms)

    @property
    def iqr_ms(self) -> float:
        """Distance of the quartiles: the spread that one disturbed repeat does not change."""
        if len(self.samples_ms) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples_ms, n=4, method="inclusive")
        return high - low

    def as_dict(self, prefix: str) -> dict[str, float]:
        """``{prefix}_ms`` and ``{prefix}_iqr_ms``, rounded to a microsecond."""
        return {f"{prefix}_ms": round(self.median_ms, 3), f"{prefix}_iqr_ms": round(self.iqr_ms, 3)}

    def __str__(self) -> str:
        return f"{self.median_ms:.1f} ± {self.iqr_ms:.1f}"


class Stopwatch:
    """Collects the times of named things; a GPU's queue is drained before the clock is read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._samples: dict[str, list[float]] = {}

    def time(self, name: str, function: Callable[[], Any]) -> Any:
        """Run ``function`` once, file its time under ``name`` and return its result."""
        self._synchronize()
        start = time.perf_counter()
        result = function()
        self._synchronize()
        self.add(name, (time.perf_counter() - start) * 1e3)
        return result

    def add(self, name: str, milliseconds: float) -> None:
        """File a time that was taken elsewhere, such as the sum of several."""
        self._samples.setdefault(name, []).append(milliseconds)

    def __getitem__(self, name: str) -> Timing:
        return Timing(tuple(self._samples[name]))

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def alternate(
    sides: Sequence[Callable[[Stopwatch], None]], *, repeats: int, warmup: int, device: torch.device
) -> Stopwatch:
    """Time several things in turn (A, B, A, B, …), so that a machine that slows down slows all of them.

    Args:
        sides: each runs its thing once and times, with the stopwatch it is given, the part that counts.
        repeats: timed rounds.
        warmup: rounds before them whose times are dropped.
        device: whose queue has to be empty before the clock is read.
    """
    for _ in range(warmup):
        for side in sides:
            side(Stopwatch(device))
    stopwatch = Stopwatch(device)
    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats):
            for side in sides:
                side(stopwatch)
    finally:
        gc.enable()
    return stopwatch


@contextmanager
def replay_times(copies: int = 5) -> Iterator[list[float]]:
    """Collect what every CUDA graph replayed inside the block costs the GPU, in milliseconds.

    Each replay is repeated ``copies`` times between two events, behind one that keeps the GPU busy while they are
    launched. So the time holds no launch and no wait; it is right for graphs that do not change their own inputs.
    """
    original = torch.cuda.CUDAGraph.replay
    times: list[float] = []

    def replay(graph: torch.cuda.CUDAGraph) -> None:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        original(graph)
        start.record()
        for _ in range(copies):
            original(graph)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / copies)

    torch.cuda.CUDAGraph.replay = replay  # type: ignore[method-assign, assignment]
    try:
        yield times
    finally:
        torch.cuda.CUDAGraph.replay = original  # type: ignore[method-assign]


def kernel_times(runs: Sequence[Sequence[Callable[[], Any]]], repeats: int, device: torch.device) -> list[float]:
    """Microseconds of small pieces of work, taken in turn.

    Args:
        runs: per piece, calls that do it, on other memory each, so that no cache serves the next one.
        repeats: timed rounds.
        device: where they run. On a GPU the median inside a CUDA graph, as a step runs them; on a processor the least
            of the first call of each, since what disturbs a processor only ever adds.
    """
    return (_times_on_cuda if device.type == "cuda" else _times_on_cpu)(runs, repeats)


def _times_on_cpu(runs: Sequence[Sequence[Callable[[], Any]]], repeats: int) -> list[float]:
    times: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats + 1):
        for (run, *_), found in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            if repeat:
                found.append((time.perf_counter() - start) * 1e6)
    return [min(found) for found in times]


def _times_on_cuda(runs: Sequence[Sequence[Callable[[], Any]]], repeats: int) -> list[float]:
    rounds = 3
    # Nobody reads the results, so all graphs may write to the same memory.
    pool = torch.cuda.graph_pool_handle()
    graphs: list[tuple[torch.cuda.CUDAGraph, int]] = []
    for functions in runs:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            functions[0]()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            for _ in range(rounds):
                for function in functions:
                    function()
        graphs.append((graph, rounds * len(functions)))
    times: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats + 1):
        for (graph, launches), found in zip(graphs, times, strict=True):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if repeat:
                found.append(start.elapsed_time(end) * 1e3 / launches)
    return [statistics.median(found) for found in times]


@dataclass(frozen=True)
class Kernel:
    """One kernel of a profile: launches and microseconds a call."""

    name: str
    launches: float
    microseconds: float


def profile_kernels(function: Callable[[], Any], calls: int = 1) -> list[Kernel]:
    """What the GPU does while ``function`` makes ``calls`` calls, the largest part first."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        function()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in profiler.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found.setdefault(event.name, []).append(event.time_range.elapsed_us())
    kernels = [Kernel(name, len(times) / calls, sum(times) / calls) for name, times in found.items()]
    return sorted(kernels, key=lambda kernel: -kernel.microseconds)


def largest_error(outputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """How far outputs are from the expected ones at most, relative to the largest expected value of each."""
    pairs = [(output.float(), base.float()) for output, base in zip(outputs, expected, strict=True)]
    return max(((output - base).abs().max() / base.abs().max()).item() for output, base in pairs)


def forget_compiled(device: torch.device) -> None:
    """Give back what a model that is no longer referred to left in torch.compile's caches and on the device."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were taken on, and what else it was doing."""
    description: dict[str, Any] = {
        **environment.machine(device),
        "device": device.type,
        "system": platform.system(),
        "architecture": platform.machine(),
        "threads": torch.get_num_threads(),
        "load_average": _load_average(),
    }
    if device.type == "cuda":
        description["gpu_memory_gib"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
    return description


def versions() -> dict[str, str]:
    """Versions of Python, CUDA and the libraries a number depends on."""
    return environment.versions(LIBRARIES)


@dataclass(frozen=True)
class Report:
    """A finished benchmark.

    Attributes:
        benchmark: name of the module that ran.
        settings: its options, so that the run can be repeated.
        machine: see :func:`machine`.
        versions: see :func:`versions`.
        rows: the measurements, one JSON object each.
    """

    benchmark: str
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    rows: Sequence[Mapping[str, Any]]

    def as_json(self) -> str:
        return json.dumps(
            {
                "benchmark": self.benchmark,
                "settings": dict(self.settings),
                "machine": dict(self.machine),
                "versions": dict(self.versions),
                "rows": [dict(row) for row in self.rows],
            },
            indent=2,
        )

    def publish(self, table: Table, path: Path | None, console: Console | None = None) -> None:
        """Print machine, versions and table; write the JSON to ``path`` unless it is ``None``."""
        console = console or Console()
        for label, facts in (("machine", self.machine), ("versions", self.versions)):
            shown = ", ".join(f"{key} {value}" for key, value in facts.items() if value is not None)
            console.print(f"[bold]{label}[/bold]: {shown}", highlight=False, soft_wrap=True)
        console.print(table)
        if path is not None:
            self.write(path)
            console.print(f"written to {path}", highlight=False, soft_wrap=True)

    def write(self, path: Path) -> None:
        """Write the JSON; a long benchmark does so after every row."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.as_json() + "\n", encoding="utf-8")


def argument_parser(description: str, *, repeats: int) -> argparse.ArgumentParser:
    """The options every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=_WithDefaults)
    parser.add_argument("--device", default="cpu", help="where to run: cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: float32 on a CPU")
    parser.add_argument("--threads", type=positive, help="CPU threads; default: what torch chooses")
    parser.add_argument("--repeats", type=positive, default=repeats, help="timed repeats of everything")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here as well")
    return parser


class _WithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Adds its default to the help of an option, but no ``None``: what stands for that is in the option's own words."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def positive(text: str) -> int:
    """A whole number of at least one, for ``argparse``."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least one")
    return number


def prepare(options: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Apply ``--threads`` and resolve ``--device`` and ``--dtype``.

    Raises:
        SystemExit: the device is not there, or nothing can be written where ``--json`` says.
    """
    if options.json is not None:
        _check_writable(options.json)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        device = torch.device(options.device)
    except RuntimeError as error:
        raise SystemExit(f"--device {options.device}: no device; name cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: this machine has no CUDA device, or this torch was built without CUDA")
    default = "float32" if device.type == "cpu" else "float16"
    return device, getattr(torch, options.dtype or default)


def _check_writable(path: Path) -> None:
    """Fail before the work, not after it, if the report cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--json {path}: cannot be written ({error.strerror}); name another file") from error
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise SystemExit(f"--json {path}: is a folder, or may not be written; name another file")


def _load_average() -> float | None:
    """Work already queued when the benchmark began: above zero, the numbers carry somebody else's work."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
