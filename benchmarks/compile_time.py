"""How long does compiling a UNet take, and how long the next process that finds it in the cache?

Every measurement is a process of its own: the first with an empty cache folder (``FISEDIT_CACHE_DIR``), the
second with what the first one left. Building the model and importing libraries are not counted;
``sparsify()`` is, with everything it needs before the first call. Weights are not read, so an untrained
UNet stands for SD2.1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: make the repository's root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.table import Table

from benchmarks.harness import Report, Timing, argument_parser, machine, prepare, versions
from benchmarks.subjects import load_unet, random_sd21_unet

MODELS = ("emoji-scenes", "sd21")
CACHE_VARIABLE = "FISEDIT_CACHE_DIR"


def compile_once(model: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Compile in this process, with whatever cache the environment names. Times are in milliseconds."""
    from fisedit_compiler import sparsify

    unet = load_unet(None, device, dtype) if model == "emoji-scenes" else random_sd21_unet("meta", dtype)
    start = time.perf_counter()
    compiled = sparsify(unet)
    elapsed = (time.perf_counter() - start) * 1e3
    return {
        "ms": elapsed,
        "from_cache": all(program.from_cache for program in compiled.programs),
        "parameters": sum(parameter.numel() for parameter in unet.parameters()),
    }


def in_new_process(model: str, options: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """Run :func:`compile_once` in a fresh interpreter with ``cache`` as its cache folder."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", model, "--device", options.device]
    for name in ("dtype", "threads"):
        if getattr(options, name) is not None:
            command += [f"--{name}", str(getattr(options, name))]
    finished = subprocess.run(
        command, env={**os.environ, CACHE_VARIABLE: str(cache)}, capture_output=True, text=True, check=False
    )
    if finished.returncode != 0:
        raise SystemExit(f"compiling {model} failed:\n{finished.stderr}")
    return json.loads(finished.stdout.splitlines()[-1])


def measure(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row: cold and warm compile time of one model."""
    cold: list[float] = []
    warm: list[float] = []
    parameters = 0
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory(prefix="fisedit-bench-") as folder:
            first = in_new_process(model, options, Path(folder))
            second = in_new_process(model, options, Path(folder))
            size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        if first["from_cache"] or not second["from_cache"]:
            raise SystemExit(
                f"{model}: the {'second process missed' if not second['from_cache'] else 'first process hit'} the "
                "cache, so there is no cold and warm time to compare. If no source file changed meanwhile, this is "
                "a defect of the cache key."
            )
        cold.append(first["ms"])
        warm.append(second["ms"])
        parameters = first["parameters"]
    cold_time, warm_time = Timing(tuple(cold)), Timing(tuple(warm))
    return {
        "model": model,
        "parameters": parameters,
        **cold_time.as_dict("cold"),
        **warm_time.as_dict("warm"),
        "ratio": round(cold_time.median_ms / warm_time.median_ms, 2),
        "cache_bytes": size,
    }


def draw(rows: list[dict[str, Any]]) -> Table:
    """The rows as a table for people."""
    table = Table(title="compile time", caption="median ± interquartile range; ratio = cold / warm")
    for column in ("model", "parameters", "cold s", "warm s", "ratio", "cache"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        table.add_row(
            row["model"],
            f"{row['parameters'] / 1e6:.0f} M",
            *(f"{row[f'{name}_ms'] / 1e3:.1f} ± {row[f'{name}_iqr_ms'] / 1e3:.1f}" for name in ("cold", "warm")),
            f"{row['ratio']:.1f}x",
            f"{row['cache_bytes'] / 2**20:.1f} MiB",
        )
    return table


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argument_parser(str(__doc__).splitlines()[0], repeats=3)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="what to compile")
    parser.add_argument("--worker", choices=MODELS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> Report | None:
    """Run the benchmark, print and write its report. As a worker, print one JSON line instead."""
    options = parse(arguments)
    device, dtype = prepare(options)
    if options.worker is not None:
        print(json.dumps(compile_once(options.worker, device, dtype)))
        return None
    facts = machine(device)
    rows = [measure(model, options) for model in options.models]
    settings = {
        "models": options.models,
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": options.repeats,
    }
    report = Report("compile_time", settings, facts, versions(), rows)
    report.publish(draw(rows), options.json)
    return report


if __name__ == "__main__":
    main()
