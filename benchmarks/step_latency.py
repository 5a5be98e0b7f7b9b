"""How long is a sparse step, by mask area, against the dense step of the same model in the same run?

A run is recorded; then, for every mask fraction, the dense call of the original module and the sparse call of
the compiled one are timed in turn, both with the edited prompt. ``ratio`` is dense over sparse. With ``--models``
full-size UNets are measured on a GPU against torch.compile too, see ``step_latency_cuda.py``. Above the break-even the
compiled module runs its calls densely; ``kind`` names those rows, and ``--dense-above 1`` measures sparse calls there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: make the repository's root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.table import Table

from benchmarks.support import steps_on_cuda as step_latency_cuda
from benchmarks.support.dense_forms import FORMS, STRONGEST
from benchmarks.support.harness import (
    Report,
    Stopwatch,
    alternate,
    argument_parser,
    machine,
    positive,
    prepare,
    versions,
)
from benchmarks.support.subjects import Call, load_unet, make_call, square_mask

FRACTIONS = (0.02, 0.06, 0.15, 0.30, 0.60, 1.00)


def measure(
    unet: torch.nn.Module, compiled: Any, call: Call, fraction: float, *, repeats: int, warmup: int
) -> dict[str, Any]:
    """One row: dense and sparse step at one mask fraction; ``kind`` says how the calls of the edit ran.

    Two calls are recorded and two are run in every edit, each edit with a prompt never seen before. Its first
    call also computes what depends on the prompt alone; the second one is the step that a run repeats, and is
    what ``sparse_ms`` means. The mask's tables are built in the warm-up and serve every edit with that mask.
    """
    mask = square_mask(fraction, *call.sample.shape[-2:]).to(call.sample.device)
    with compiled.record() as recording:
        for _ in range(2):
            call.dense(compiled)

    kinds: set[str] = set()

    def dense(stopwatch: Stopwatch) -> None:
        stopwatch.time("dense", lambda: call.dense(unet, text=call.edit_text))

    def sparse(stopwatch: Stopwatch) -> None:
        new_text = torch.randn_like(call.edit_text)
        with compiled.edit(recording, mask=mask) as session:
            stopwatch.time("first", lambda: call.dense(compiled, text=new_text))
            stopwatch.time("sparse", lambda: call.dense(compiled, text=new_text))
        kinds.update(kind for kind, _ in session.timings)

    stopwatch = alternate([dense, sparse], repeats=repeats, warmup=warmup, device=call.sample.device)
    dense_time, sparse_time = stopwatch["dense"], stopwatch["sparse"]
    (kind,) = kinds
    return {
        "mask_fraction": round(mask.float().mean().item(), 4),
        "requested_fraction": fraction,
        "kind": kind,
        **dense_time.as_dict("dense"),
        **sparse_time.as_dict("sparse"),
        **stopwatch["first"].as_dict("sparse_first_call"),
        "ratio": round(dense_time.median_ms / sparse_time.median_ms, 3),
    }


def draw(rows: list[dict[str, Any]], title: str) -> Table:
    """The rows as a table for people."""
    table = Table(title=title, caption="median ± interquartile range; ratio = dense / sparse")
    for column in ("mask", "runs", "dense ms", "sparse ms", "first call ms", "ratio"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            f"{row['mask_fraction']:.1%}",
            row["kind"],
            *(
                f"{row[f'{name}_ms']:.1f} ± {row[f'{name}_iqr_ms']:.1f}"
                for name in ("dense", "sparse", "sparse_first_call")
            ),
            f"{row['ratio']:.2f}x",
        )
    return table


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argument_parser(str(__doc__).splitlines()[0], repeats=15)
    parser.add_argument("--model", type=Path, metavar="DIR", help="a model in diffusers layout; default: embedded")
    parser.add_argument("--models", nargs="+", choices=step_latency_cuda.MODELS, help="full-size UNets, on a GPU only")
    parser.add_argument("--fractions", type=area, nargs="+", metavar="F", help="mask areas; above 1: in percent")
    parser.add_argument("--height", type=positive, default=64, help="of the latents")
    parser.add_argument("--width", type=positive, default=64, help="of the latents")
    parser.add_argument("--batch", type=positive, default=2, help="2 is one image with guidance")
    parser.add_argument("--tokens", type=positive, help="length of the text; default: 32 embedded, else 77")
    parser.add_argument("--norm", default="recorded", help="SparsifyConfig.norm")
    parser.add_argument("--attention", default="cached", help="SparsifyConfig.attention")
    parser.add_argument("--backend", default="inductor", help="SparsifyConfig.backend; auto is how sparsify() comes")
    parser.add_argument("--dense-above", type=area, metavar="F", help="SparsifyConfig.dense_above; 1 is never")
    parser.add_argument("--warmup", type=positive, default=2, help="untimed repeats before the timed ones")
    parser.add_argument("--dense-form", choices=FORMS, default=STRONGEST, help="of the compiled baseline")
    parser.add_argument("--calls", type=positive, default=6, help="with --models: UNet calls of the recorded run")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="with --models: append kernel lists at 5 %% area")
    parser.add_argument("--peers", action="store_true", help="with --models: DeepCache and tomesd too, if installed")
    options = parser.parse_args(arguments)
    if options.fractions is None:
        options.fractions = list(step_latency_cuda.FRACTIONS if options.models else FRACTIONS)
    if options.calls < 2:
        parser.error("--calls must be at least 2: the first call of an edit is timed apart from the others")
    return options


def area(text: str) -> float:
    """A mask area for ``argparse``: 0.05 and 5 are the same, 1 is everything."""
    value = float(text)
    return value / 100 if value > 1 else value


def ran_on(compiled: Any, device: torch.device) -> str:
    """What the sparse calls of a module ran on, which a refusal under ``backend="auto"`` may have changed."""
    refused = any(executable.backend.refused for executable in compiled._programs.executables())
    return "eager" if refused else str(compiled.sparsify_config.backend_on(device.type))


def main(arguments: list[str] | None = None) -> Report:
    """Run the benchmark, print and write its report."""
    options = parse(arguments)
    device, dtype = prepare(options)
    if options.models:
        if device.type != "cuda":
            raise SystemExit(f"--models measures full-size UNets and needs --device cuda, got --device {device}")
        return step_latency_cuda.measure_models(options, device, dtype)
    from fisedit_compiler import SparsifyConfig, sparsify

    facts = machine(device)
    unet = load_unet(options.model, device, dtype)
    call = make_call(
        unet,
        batch=options.batch,
        height=options.height,
        width=options.width,
        tokens=options.tokens or (77 if options.model else 32),
    )
    config = SparsifyConfig(
        norm=options.norm, attention=options.attention, backend=options.backend, dense_above=options.dense_above
    )
    compiled = sparsify(unet, config)
    with torch.no_grad():
        rows = [
            measure(unet, compiled, call, fraction, repeats=options.repeats, warmup=options.warmup)
            for fraction in options.fractions
        ]
    settings = {
        "model": options.model.name if options.model else "emoji-scenes",
        "latents": [options.batch, *call.sample.shape[1:]],
        "dtype": str(dtype).removeprefix("torch."),
        "norm": options.norm,
        "attention": options.attention,
        "backend": ran_on(compiled, device),
        "backend_asked": options.backend,
        "dense_above": options.dense_above,
        "repeats": options.repeats,
        "warmup": options.warmup,
    }
    report = Report("step_latency", settings, facts, versions(), rows)
    title = f"{settings['model']}, latents {settings['latents']}, {settings['dtype']}"
    report.publish(draw(rows, title), options.json)
    return report


if __name__ == "__main__":
    main()
