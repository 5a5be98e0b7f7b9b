"""How long does compiling a UNet take, and how long the next process that finds it in the cache?

Every measurement is a process of its own: the first with empty cache folders (``FISEDIT_CACHE_DIR``, and those of
Inductor and Triton), the second with what the first one left. Building the model and importing libraries are not
counted; ``sparsify()`` is, with everything it needs before the first call. On a GPU the first sparse call is counted as
well, since it compiles the step. With ``--editor`` it is what a user of ``Editor(pipe)`` waits for: the base run and
the first edit, text encoder and VAE included. Weights are not read, so untrained UNets stand for the published ones.
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

from benchmarks.support.harness import Report, Timing, argument_parser, machine, positive, prepare, versions
from benchmarks.support.subjects import UNETS, Run, load_unet, random_unet, square_mask

MODELS = ("emoji-scenes", *UNETS)
DEFAULT = ("emoji-scenes", "sd21")
CACHES = ("FISEDIT_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
FRACTION = 0.05


def compile_once(model: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Compile in this process, with whatever cache the environment names. Times are in milliseconds."""
    from fisedit_compiler import SparsifyConfig, sparsify

    on_gpu = device.type == "cuda"
    if model == "emoji-scenes":
        unet = load_unet(None, device, dtype)
    else:
        unet = random_unet(model, device if on_gpu else "meta", dtype)
    start = time.perf_counter()
    compiled = sparsify(unet, SparsifyConfig(backend="inductor" if on_gpu else "eager"))
    capture = (time.perf_counter() - start) * 1e3
    first_call = first_sparse_call(compiled, unet, device) if on_gpu else 0.0
    return {
        "ms": capture + first_call,
        "capture_ms": capture,
        "first_call_ms": first_call,
        "from_cache": all(program.from_cache for program in compiled.programs),
        "parameters": sum(parameter.numel() for parameter in unet.parameters()),
    }


def edit_once(model: str, device: torch.device, dtype: torch.dtype, steps: int) -> dict[str, Any]:
    """Make a base and an edit of it in this process, as they come. Times are in milliseconds."""
    from benchmarks.support import pipelines
    from fisedit_compiler import Editor

    pipe = pipelines.load(model, device, dtype)
    pipe.set_progress_bar_config(disable=True)
    side = pipe.unet.config.sample_size
    mask = square_mask(FRACTION, side, side)
    start = time.perf_counter()
    with Editor(pipe) as editor:
        base = editor.generate("a cat on the left and a rocket on the right", seed=7, num_inference_steps=steps)
        made = time.perf_counter()
        editor.edit(base, "a dog on the left and a rocket on the right", mask=mask)
        end = time.perf_counter()
        from_cache = all(program.from_cache for program in editor.compiled.programs)
    return {
        "ms": (end - start) * 1e3,
        "base_ms": (made - start) * 1e3,
        "first_edit_ms": (end - made) * 1e3,
        "from_cache": from_cache,
        "parameters": sum(parameter.numel() for parameter in pipe.unet.parameters()),
    }


@torch.no_grad()
def first_sparse_call(compiled: Any, unet: torch.nn.Module, device: torch.device) -> float:
    """Milliseconds from entering the first edit to its first finished call. Recording is not counted."""
    run = Run(unet, calls=1)
    with compiled.record() as recording:
        run.dense(compiled, 0, run.samples, run.prompt)
    mask = square_mask(FRACTION, run.height, run.width).to(device)
    samples = run.edited_samples(mask)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    with compiled.edit(recording, mask=mask):
        run.dense(compiled, 0, samples, run.new_prompt())
        torch.cuda.synchronize(device)
        return (time.perf_counter() - start) * 1e3


def in_new_process(model: str, options: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """Run :func:`compile_once` or :func:`edit_once` in a fresh interpreter with its caches under ``cache``."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", model, "--device", options.device]
    if options.editor:
        command += ["--editor", "--steps", str(options.steps)]
    for name in ("dtype", "threads"):
        if getattr(options, name) is not None:
            command += [f"--{name}", str(getattr(options, name))]
    environment = {**os.environ, **{name: str(cache / name.lower()) for name in CACHES}}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise SystemExit(f"compiling {model} failed:\n{finished.stderr}")
    return json.loads(finished.stdout.splitlines()[-1])


def measure(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row: cold and warm compile time of one model."""
    runs: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
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
        runs["cold"].append(first)
        runs["warm"].append(second)
    row: dict[str, Any] = {"model": model, "parameters": runs["cold"][0]["parameters"]}
    for name, results in runs.items():
        row |= Timing(tuple(result["ms"] for result in results)).as_dict(name)
        parts = ("base", "first_edit") if options.editor else ("capture", "first_call")
        if options.editor or options.device != "cpu":
            for part in parts:
                timing = Timing(tuple(result[f"{part}_ms"] for result in results))
                row[f"{name}_{part}_ms"] = round(timing.median_ms, 3)
    return {**row, "ratio": round(row["cold_ms"] / row["warm_ms"], 2), "cache_bytes": size}


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
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(DEFAULT), help="what to compile")
    parser.add_argument("--editor", action="store_true", help="a base run and the first edit of Editor(pipe) instead")
    parser.add_argument("--steps", type=positive, default=50, help="of both; default: 50")
    parser.add_argument("--worker", choices=MODELS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> Report | None:
    """Run the benchmark, print and write its report. As a worker, print one JSON line instead."""
    options = parse(arguments)
    device, dtype = prepare(options)
    if options.worker is not None:
        found = (
            edit_once(options.worker, device, dtype, options.steps)
            if options.editor
            else compile_once(options.worker, device, dtype)
        )
        print(json.dumps(found))
        return None
    facts = machine(device)
    rows = [measure(model, options) for model in options.models]
    settings = {
        "models": options.models,
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": options.repeats,
        "editor": options.editor,
        "steps": options.steps if options.editor else None,
    }
    report = Report("compile_time", settings, facts, versions(), rows)
    report.publish(draw(rows), options.json)
    return report


if __name__ == "__main__":
    main()
