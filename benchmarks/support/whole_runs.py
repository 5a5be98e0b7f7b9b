"""Whole runs of a stock pipeline, from the prompt to the PIL picture: the dense baselines of whole edits."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from benchmarks.support import pipelines
from benchmarks.support.dense_forms import FORMS, NO_FORM, STRONGEST, compiled_unet
from benchmarks.support.harness import Stopwatch, positive
from benchmarks.support.peers import in_pipeline, prepare_run_peers
from benchmarks.support.subjects import square_mask

STEPS = {"cuda": 50, "cpu": 10}
GUIDANCE = 5.0
SEED = 7
BASE_PROMPT = "a cat on the left and a rocket on the right"
EAGER, COMPILED = "eager", "compiled"

R = TypeVar("R", bound="WholeRuns")


@dataclass
class WholeRuns:
    """One pipeline, the settings of its runs, and its UNet in the forms that run densely.

    Attributes:
        name: of the pipeline.
        pipe: a stock pipeline.
        options: of the command line.
        steps: of the scheduler.
        side: of the picture, in pixels.
        dense: a UNet by the name of each baseline, or a :class:`~benchmarks.support.peers.RunPeer`.
        prompts: without end.
        facts: what was found out on the way, such as seconds of compilation; part of every row.
    """

    name: str
    pipe: Any
    options: argparse.Namespace
    steps: int
    side: int
    dense: dict[str, Any]
    prompts: Iterator[str]
    facts: dict[str, Any]

    @property
    def device(self) -> torch.device:
        return self.pipe.device  # type: ignore[no-any-return]

    @property
    def settings(self) -> dict[str, Any]:
        """Of the base, for :meth:`Editor.generate`."""
        side = {"height": self.side, "width": self.side}
        return {"seed": SEED, "num_inference_steps": self.steps, "guidance_scale": self.options.guidance, **side}

    def mask(self, fraction: float) -> torch.Tensor:
        """A compact mask at the size of the latents, on the CPU as a user's is."""
        side = self.side // self.pipe.vae_scale_factor
        return square_mask(fraction, side, side)

    def run(self, prompt: str, **options: Any) -> Any:
        """The stock pipeline with whatever UNet it has, from the base's noise; a PIL image."""
        return self.pipe(
            prompt=prompt,
            num_inference_steps=self.steps,
            guidance_scale=self.options.guidance,
            height=self.side,
            width=self.side,
            generator=torch.Generator("cpu").manual_seed(SEED),
            output_type="pil",
            **options,
        ).images[0]

    def time_dense_run(self, name: str, stopwatch: Stopwatch) -> None:
        """One run of a dense baseline."""
        with in_pipeline(self.pipe, self.dense[name]):
            stopwatch.time(name, partial(self.run, next(self.prompts)))

    @contextmanager
    def fact(self, name: str) -> Iterator[None]:
        """Note the seconds that the block takes among the facts."""
        with noted(self.facts, name, self.device):
            yield


@contextmanager
def noted(facts: dict[str, Any], name: str, device: torch.device) -> Iterator[None]:
    """Note the seconds that the block takes, what it left in the GPU's queue included."""
    start = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    facts[name] = round(time.perf_counter() - start, 3)


def load_runs(
    kind: Callable[..., R], name: str, options: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> R:
    """Load a pipeline and run it once, eagerly.

    Args:
        kind: the class of what is returned.
        name: one of :data:`~benchmarks.support.pipelines.PIPELINES`.
        options: of the command line, see :func:`add_run_options`.
        device: where the pipeline is put.
        dtype: of all weights.
    """
    pipe = pipelines.load(name, device, dtype, options.scheduler)
    size = options.size or pipe.unet.config.sample_size * pipe.vae_scale_factor
    steps = options.steps or STEPS.get(device.type, STEPS["cpu"])
    runs = kind(name, pipe, options, steps, size, {EAGER: pipe.unet}, prompts(), {})
    with runs.fact("eager_first_run_s"):
        runs.run(BASE_PROMPT)
    return runs


def add_baselines(runs: WholeRuns) -> dict[str, str]:
    """Compile the UNet in the form that was asked for and prepare the peers; returns notes on the latter, by name.

    The pipeline keeps the UNet it has.
    """
    before, unet, options = runs.pipe.unet, runs.dense[EAGER], runs.options
    if options.dense_form != NO_FORM:
        runs.dense[COMPILED] = compiled_unet(unet, options.dense_form)
        runs.facts["dense_form"] = options.dense_form
        with runs.fact("dense_compile_s"), in_pipeline(runs.pipe, runs.dense[COMPILED]):
            runs.run(BASE_PROMPT)
    found = prepare_run_peers(unet, runs.pipe, partial(runs.run, BASE_PROMPT)) if options.peers else []
    runs.dense |= {peer.name: peer for peer in found}
    runs.pipe.unet = before
    return {peer.name: peer.note for peer in found}


def prompts(text: str = "a golden {name} on the {place} and a rocket in the center") -> Iterator[str]:
    """Prompts without end, of which no two in a row are equal; none is the base's."""
    from fisedit_compiler.models import embedded_object_names

    places = ("left", "right") if "{place}" in text else ("",)
    for name, place in itertools.cycle(itertools.product(embedded_object_names(), places)):
        yield text.format(name=name, place=place)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """What is run: models, schedule, size, baselines, and untimed rounds."""
    parser.add_argument(
        "--models", nargs="+", choices=pipelines.PIPELINES, default=[pipelines.EMBEDDED], help="full-size: on a GPU"
    )
    parser.add_argument("--steps", type=positive, help="of the scheduler; default: 50 on a GPU, 10 on a CPU")
    pipelines.add_schedule_options(parser, guidance=GUIDANCE)
    parser.add_argument("--size", type=positive, help="side of the image in pixels; default: the model's")
    parser.add_argument("--dense-form", choices=(*FORMS, NO_FORM), default=STRONGEST, help="of the compiled baseline")
    parser.add_argument("--peers", action="store_true", help="DeepCache and tomesd as baselines too, if installed")
    parser.add_argument("--warmup", type=positive, default=1, help="untimed repeats before the timed ones")
