"""A long run over generated modules: ``python -m tests.fuzz.run --modules 2000 --seed 0``.

Prints how many modules were right, refused in words and failed, with the seed, the commonest refusals, and every
failing module in as few lines as still fail.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections import Counter

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.oracle import Verdict, judge
from tests.fuzz.programs import GeneratedProgram, programs, shortest


def run(modules: int, first_seed: int, most: int, progress: int = 0) -> list[tuple[GeneratedProgram, Verdict]]:
    """Judge ``modules`` different programs drawn from one seed."""
    judged: list[tuple[GeneratedProgram, Verdict]] = []
    began = time.perf_counter()

    @seed(first_seed)
    @settings(
        max_examples=modules, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(programs(most))
    def draw(program: GeneratedProgram) -> None:
        torch._dynamo.reset()
        judged.append((program, judge(program)))
        if judged[-1][1].outcome == "failed":
            print(f"failed: {judged[-1][1].reason}\n  {program}", flush=True)
        if progress and len(judged) % progress == 0:
            counts = Counter(verdict.outcome for _, verdict in judged)
            print(f"{len(judged)} in {time.perf_counter() - began:.0f} s: {dict(counts)}", flush=True)

    draw()
    return judged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modules", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=8, help="most steps of one module")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("torch").setLevel(logging.ERROR)
    judged = run(options.modules, options.seed, options.steps, progress=100)
    counts = Counter(verdict.outcome for _, verdict in judged)
    for program, verdict in judged:
        if verdict.outcome == "failed":
            short = shortest(program, lambda shorter: judge(shorter).outcome == "failed")
            print(f"\nfailed, shortened: {judge(short).reason}\n  {short}")
    refusals = Counter(verdict.reason[:110] for _, verdict in judged if verdict.outcome == "refused")
    for reason, count in refusals.most_common(12):
        print(f"refused {count} times: {reason}")
    shares = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("right", "refused", "failed"))
    print(f"seed {options.seed}: {len(judged)} modules, {shares}")
    raise SystemExit(1 if counts["failed"] else 0)


if __name__ == "__main__":
    main()
