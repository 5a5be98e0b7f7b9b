"""How long is a sparse step, by mask area, against the dense step of the same model in the same run?

A run is recorded; then, for every mask fraction, the dense calls of the original module (on a CPU eager and under
torch.compile, with and without channels_last: ``dense_forms.py``) and the sparse call of the compiled one are timed in
turn, all with the edited prompt. ``ratio`` is a baseline over sparse, and ``strongest`` marks the fastest baseline.
With ``--models`` full-size UNets are measured on a GPU, see ``support/steps_on_cuda.py``. Above the break-even the
compiled module runs its calls densely; ``kind`` names those rows, and ``--dense-above 1`` measures sparse calls there.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: make the repository's root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.table import Table

from benchmarks.support import steps_on_cuda as step_latency_cuda
from benchmarks.support.dense_forms import BASELINES, EAGER, FORMS, STRONGEST, dense_baseline, mark_strongest
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
from benchmarks.support.peers import Peer, prepare_peers
from benchmarks.support.subjects import Call, Run, load_unet, make_call, square_mask

FRACTIONS = (0.02, 0.06, 0.15, 0.30, 0.60, 1.00)


def measure(
    baselines: Mapping[str, Callable[..., Any]],
    compiled: Any,
    call: Call,
    fraction: float,
    *,
    repeats: int,
    warmup: int,
    peers: Sequence[Peer] = (),
    run: Run | None = None,
) -> list[dict[str, Any]]:
    """The rows of one mask fraction, one a baseline; ``kind`` says how the calls of the edit ran.

    Two calls are recorded and two are run in every edit, each edit with a prompt never seen before. Its first
    call also computes what depends on the prompt alone; the second one is the step that a run repeats, and is
    what ``sparse_ms`` means. The mask's tables are built in the warm-up and serve every edit with that mask. Peers
    need a ``run``, since what they skip depends on the call.
    """
    mask = square_mask(fraction, *call.sample.shape[-2:]).to(call.sample.device)
    with compiled.record() as recording:
        for _ in range(2):
            call.dense(compiled)

    kinds: set[str] = set()

    def dense(name: str, stopwatch: Stopwatch) -> None:
        stopwatch.time(name, lambda: call.dense(baselines[name], text=call.edit_text))

    def sparse(stopwatch: Stopwatch) -> None:
        new_text = torch.randn_like(call.edit_text)
        with compiled.edit(recording, mask=mask) as session:
            stopwatch.time("first", lambda: call.dense(compiled, text=new_text))
            stopwatch.time("sparse", lambda: call.dense(compiled, text=new_text))
        kinds.update(kind for kind, _ in session.timings)

    sides: list[Callable[[Stopwatch], None]] = [*(partial(dense, name) for name in baselines), sparse]
    if run is not None:
        sides += [partial(peer.time, run, run.samples, run.prompt) for peer in peers]
    stopwatch = alternate(sides, repeats=repeats, warmup=warmup, device=call.sample.device)
    (kind,) = kinds
    timings = {name: stopwatch[name] for name in baselines} | {peer.name: peer.timing(stopwatch) for peer in peers}
    return [
        {
            "mask_fraction": round(mask.float().mean().item(), 4),
            "requested_fraction": fraction,
            "kind": kind,
            "baseline": name,
            **timing.as_dict("baseline"),
            **stopwatch["sparse"].as_dict("sparse"),
            **stopwatch["first"].as_dict("sparse_first_call"),
            "ratio": round(timing.median_ms / stopwatch["sparse"].median_ms, 3),
        }
        for name, timing in timings.items()
    ]


def draw(rows: list[dict[str, Any]], title: str) -> Table:
    """The rows as a table for people."""
    caption = "median ± interquartile range; ratio = baseline / sparse; * the strongest baseline of this run"
    table = Table(title=title, caption=caption)
    for column in ("mask", "runs", "baseline", "baseline ms", "sparse ms", "first call ms", "ratio"):
        table.add_column(column, justify="left" if column in ("runs", "baseline") else "right")
    for row in rows:
        table.add_row(
            f"{row['mask_fraction']:.1%}",
            row["kind"],
            f"{row['baseline']} *" if row["strongest"] else row["baseline"],
            *(
                f"{row[f'{name}_ms']:.1f} ± {row[f'{name}_iqr_ms']:.1f}"
                for name in ("baseline", "sparse", "sparse_first_call")
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
    parser.add_argument(
        "--baselines", nargs="+", choices=BASELINES, metavar="NAME", help="without --models; default: all on a CPU"
    )
    parser.add_argument("--dense-form", choices=FORMS, default=STRONGEST, help="with --models: of the compiled dense")
    parser.add_argument("--calls", type=positive, default=6, help="UNet calls of the run that --models or --peers make")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="with --models: append kernel lists at 5 %% area")
    parser.add_argument("--peers", action="store_true", help="DeepCache and tomesd too, if installed")
    options = parser.parse_args(arguments)
    if options.fractions is None:
        options.fractions = list(step_latency_cuda.FRACTIONS if options.models else FRACTIONS)
    if options.baselines is None:
        options.baselines = list(BASELINES if torch.device(options.device).type == "cpu" else (EAGER,))
    if options.calls < 2:
        parser.error("--calls must be at least 2: the first call of an edit is timed apart from the others")
    return options


def area(text: str) -> float:
    """A mask area for ``argparse``: 0.05 and 5 are the same, 1 is everything."""
    value = float(text)
    if not 0 < value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is no area; name a share up to 1, or percent above 1")
    return value / 100 if value > 1 else value


def ran_on(compiled: Any, device: torch.device) -> str:
    """What the sparse calls of a module ran on, which a refusal under ``backend="auto"`` may have changed."""
    refused = any(executable.backend.refused for executable in compiled._programs.executables())
    return "eager" if refused else str(compiled.sparsify_config.backend_on(device.type))


def first_call_s(baseline: Callable[..., Any], call: Call) -> float:
    """Seconds of a baseline's first call: compilation, or what Inductor's cache on disk leaves of it."""
    start = time.perf_counter()
    call.dense(baseline, text=call.edit_text).flatten()[0].item()
    return round(time.perf_counter() - start, 2)


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
    tokens = options.tokens or (77 if options.model else 32)
    call = make_call(unet, batch=options.batch, height=options.height, width=options.width, tokens=tokens)
    size = (options.height, options.width)
    run = Run(unet, calls=options.calls, batch=options.batch, tokens=tokens, size=size) if options.peers else None
    config = SparsifyConfig(
        norm=options.norm, attention=options.attention, backend=options.backend, dense_above=options.dense_above
    )
    compiled = sparsify(unet, config)
    baselines = {name: dense_baseline(unet, name) for name in options.baselines}
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        first_calls = {name: first_call_s(baseline, call) for name, baseline in baselines.items()}
        peers = [] if run is None else prepare_peers(unet, run)
        for fraction in options.fractions:
            rounds = {"repeats": options.repeats, "warmup": options.warmup}
            rows += measure(baselines, compiled, call, fraction, **rounds, peers=peers, run=run)
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
        "strongest": mark_strongest(rows, options.baselines),
        "baseline_first_call_s": first_calls,
        "peers": {peer.name: peer.note for peer in peers},
    }
    report = Report("step_latency", settings, facts, versions(), rows)
    title = f"{settings['model']}, latents {settings['latents']}, {settings['dtype']}"
    report.publish(draw(rows, title), options.json)
    return report


if __name__ == "__main__":
    main()
