"""A pass or a rule of another package that raises or returns rubbish is named, with the place and the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import fx, nn

from fisedit_compiler.errors import FiseditError, LayoutError, VerificationError
from fisedit_compiler.extend import GraphPass, Layout, Pass, Program, Rewriter, layout_rule, rewrite_rule
from fisedit_compiler.graph.layout_rules import LAYOUT_RULES
from fisedit_compiler.passes.rewrites.extensions import RULES
from tests.support.pass_tools import CHANNELS, Forward, compile_small

SILU = torch.ops.aten.silu.default


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """Rules registered by a test are forgotten after it."""
    known = [(rules, dict(rules)) for rules in (RULES, LAYOUT_RULES)]
    yield
    for rules, before in known:
        rules.clear()
        rules.update(before)


def module() -> nn.Module:
    conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
    return Forward(lambda self, x: torch.nn.functional.silu(self.conv(x)), conv=conv)


def raises(*arguments: Any) -> Any:
    raise ZeroDivisionError("oh")


class OnNodes(Pass):
    name = "tests.on_nodes"
    before = ("pointwise",)
    targets = frozenset({SILU})

    def rewrite(self, node: fx.Node, rewriter: Rewriter) -> str | None:
        return None


class OnGraphs(GraphPass):
    name = "tests.on_graphs"

    def run(self, program: Program) -> None:
        return None


@pytest.mark.parametrize(
    ("base", "method", "answer", "words"),
    [
        (OnNodes, "rewrite", raises, r"tests\.on_nodes .*at silu = aten\.silu.*raised ZeroDivisionError: oh"),
        (
            OnNodes,
            "rewrite",
            lambda *arguments: arguments[1],
            r"tests\.on_nodes .*at silu.*returned silu, and",
        ),
        (OnNodes, "rewrite", lambda: None, r"tests\.on_nodes .*raised TypeError"),
        (OnNodes, "wants", raises, r"tests\.on_nodes .*raised ZeroDivisionError: oh"),
        (OnNodes, "__init__", raises, r"tests\.on_nodes .*raised ZeroDivisionError: oh"),
        (OnGraphs, "run", raises, r"tests\.on_graphs .*raised ZeroDivisionError: oh"),
    ],
)
def test_a_pass_is_named(base: type[GraphPass], method: str, answer: Any, words: str) -> None:
    broken = type("Broken", (base,), {method: answer, "__module__": __name__})
    with pytest.raises(VerificationError, match=words) as caught:
        compile_small(module(), extra_passes=[broken])
    assert "test_extend_faults.Broken" in str(caught.value) and "disabled_passes={'tests.on_" in str(caught.value)


@pytest.mark.parametrize("answer", [3, True, object(), ["no"]])
def test_a_rewrite_rule_that_returns_rubbish_is_named(answer: Any) -> None:
    @rewrite_rule(SILU)
    def rubbish(node: fx.Node, rewriter: Rewriter) -> Any:
        return answer

    with pytest.raises(VerificationError, match=r"rubbish returned .* for silu.*Return None after"):
        compile_small(module())


@pytest.mark.parametrize("answer", [3, None, raises, Layout(())])
def test_a_layout_rule_that_gives_rubbish_is_named(answer: Any) -> None:
    @layout_rule(SILU)
    def rubbish(node: fx.Node, inferred: Layout) -> Any:
        return answer() if callable(answer) else answer

    with pytest.raises(LayoutError, match=r"rubbish (gave|failed on) "):
        compile_small(module())


def test_all_of_them_are_errors_of_this_package() -> None:
    assert issubclass(VerificationError, FiseditError) and issubclass(LayoutError, FiseditError)
