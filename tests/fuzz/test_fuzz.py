"""Two hundred generated modules, the same at every run: each is right or refused in words. More: ``tests.fuzz.run``."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz.oracle import judge
from tests.fuzz.programs import GeneratedProgram, programs, shortest
from tests.fuzz.state import Step

MODULES = 200


def test_every_generated_module_is_right_or_refused() -> None:
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=MODULES, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(programs(most=6))
    def one(program: GeneratedProgram) -> None:
        verdict = judge(program)
        outcomes[verdict.outcome] += 1
        if verdict.outcome == "failed":
            short = shortest(program, lambda shorter: judge(shorter).outcome == "failed")
            pytest.fail(f"{judge(short).reason}\n  {short}", pytrace=False)

    one()
    assert outcomes["refused"] < outcomes["right"] / 5, outcomes


def test_a_failing_program_is_shortened_to_what_fails() -> None:
    steps = (Step("pointwise", ("tanh",)), Step("flip", (0,)), Step("pointwise", ("silu",)), Step("roll", (1,)))
    program = GeneratedProgram(4, steps)
    assert program.states() is not None
    short = shortest(program, lambda candidate: any(step.name == "roll" for step in candidate.steps))
    assert short.steps == (Step("roll", (1,)),)
    assert str(short).splitlines() == ["channels=4 seed=0: conv_in", "  roll(1)", "  home, up, conv_out"]
