"""Looking at the first steps of a run and at no more: shared by the benchmarks of masks that are found.

Which pairs of captions are run, and what is asked of the latents, is theirs.
"""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

from torch import Tensor

from benchmarks.support.harness import argument_parser, positive

STEPS = 6
"""Steps that are looked at, two more than an edit looks at."""


class _Enough(Exception):
    """Ends a run whose later steps nobody looks at."""


def first_latents(pipe: Any, mode: AbstractContextManager[Any] | None = None, **call: Any) -> list[Tensor]:
    """Latents ``[B, C, H, W]`` after each of the first :data:`STEPS` steps of a run, which ends there.

    Args:
        pipe: a diffusers pipeline.
        mode: entered for the run; it sees that the run was ended.
        call: arguments of its call.
    """
    seen: list[Tensor] = []

    def watch(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["latents"].clone())
        if len(seen) == STEPS:
            raise _Enough
        return tensors

    with suppress(_Enough), mode or nullcontext():
        pipe(**call, callback_on_step_end=watch, output_type="latent")
    return seen


def parse_pairs(description: str, arguments: list[str] | None, *, pairs: int, seed: int, what: str) -> Any:
    """Read the command line of a benchmark over pairs of captions.

    Args:
        description: of the benchmark.
        arguments: the command line; ``None`` for the program's own.
        pairs: default number of pairs.
        seed: default seed of the captions.
        what: the pairs that are meant, in words.
    """
    parser: argparse.ArgumentParser = argument_parser(description, repeats=1)
    parser.add_argument("--pairs", type=positive, default=pairs, help=what)
    parser.add_argument("--seed", type=int, default=seed, help="of the captions")
    parser.add_argument("--steps", type=positive, default=25, help="of the scheduler")
    options = parser.parse_args(arguments)
    if options.steps < STEPS:
        parser.error(f"--steps must be at least {STEPS}, which are looked at")
    return options
