"""A pass from outside writes a call that gives something else than its spec says: refused on compiling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

from fisedit_compiler.config import SparsifyConfig
from fisedit_compiler.errors import VerificationError
from fisedit_compiler.extend import GraphPass, Program, Rewriter, ValueSpec, spec_of
from fisedit_compiler.passes.rewriting import rewrite
from fisedit_compiler.passes.written_calls import verify_calls
from tests.support.compiled_zoo import compiled_model
from tests.support.pass_tools import CHANNELS, Forward, compile_small, program_of
from tests.support.zoo import ZOO

aten = torch.ops.aten


def forward(m: Any, x: Tensor) -> Tensor:
    return m.second(torch.sigmoid(m.first(x)))


def module() -> nn.Module:
    first, second = (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(2))
    return Forward(forward, first=first, second=second)


Step = Callable[[Rewriter, fx.Node], object]


def wrote(step: Step) -> type[GraphPass]:
    """A pass that does ``step`` to the sigmoid."""

    class Wrong(GraphPass):
        name = "tests.wrong"
        before: ClassVar = ("convolution",)

        def run(self, program: Program) -> None:
            node = next(node for node in program.graph.nodes if node.target is aten.sigmoid.default)
            step(Rewriter(program), node)
            program.graph.eliminate_dead_code()

    return Wrong


def exchanged(target: Any, *more: Any) -> Step:
    return lambda rewriter, node: rewriter.exchange(node, target, (node.args[0], *more))


def with_spec(change: Callable[[ValueSpec], ValueSpec]) -> Step:
    def step(rewriter: Rewriter, node: fx.Node) -> None:
        other = rewriter.exchange(node, aten.tanh.default, node.args)
        other.meta["spec"] = change(spec_of(other))

    return step


def read_instead(rewriter: Rewriter, node: fx.Node) -> None:
    """Readers of the sigmoid get a value of another dtype."""
    with rewriter.graph.inserting_after(node):
        spec = ValueSpec(spec_of(node).shape, torch.float64)
        other = rewriter.call(aten.to.dtype, (node.args[0], torch.float64), spec, node)
    other.meta = {**node.meta, "spec": spec}
    node.replace_all_uses_with(other)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (exchanged(aten.flatten.using_ints, 2), r"flatten.* gives \(2, \d+, 15\) torch.float32 where its spec says"),
        (exchanged(aten.to.dtype, torch.float64), r"to.* gives .* torch.float64 where its spec says .* torch.float32"),
        (exchanged(aten.sum.dim_IntList, [1], True), r"sum.* gives \(2, 1, 3, 5\)"),
        (exchanged(aten.mul.Tensor), r"mul.* cannot be called \(RuntimeError: .*missing value for argument 'other'"),
        (exchanged(aten.max.dim, 1), r"max.* gives several values where its spec says"),
        (with_spec(lambda spec: ValueSpec(spec.shape[:-1], spec.dtype)), r"gives \(2, \d+, 3, 5\) .*\(2, \d+, 3\)"),
        (with_spec(lambda spec: ValueSpec(spec.shape, torch.int64)), "where its spec says .* torch.int64"),
        (read_instead, r"conv2d.* cannot be called \(RuntimeError"),
    ],
    ids=["shape", "dtype", "channels", "arguments", "several", "rank in the spec", "dtype in the spec", "reader"],
)
def test_named_with_pass_and_node(step: Step, words: str) -> None:
    with pytest.raises(VerificationError, match=r"After pass tests\.wrong: .*" + words):
        compile_small(module(), extra_passes=[wrote(step)])


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (lambda rewriter, node: None, "None, which is no node"),
        (lambda rewriter, node: node.name, "'sigmoid', which is no node"),
        (lambda rewriter, node: rewriter.graph.find_nodes(op="placeholder")[0], "whose kind is placeholder"),
        (lambda rewriter, node: rewriter.graph.find_nodes(op="output")[0], "whose kind is output"),
        (lambda rewriter, node: fx.Graph().placeholder("x"), "which is no node"),
        (lambda rewriter, node: rewriter.program.captured.graph.find_nodes(op="output")[0], "which is no node"),
    ],
    ids=["None", "name", "placeholder", "output", "other graph", "captured graph"],
)
def test_only_calls_of_the_graph_are_exchanged(chosen: Callable[..., Any], words: str) -> None:
    def step(rewriter: Rewriter, node: fx.Node) -> None:
        rewriter.exchange(chosen(rewriter, node), aten.tanh.default, node.args)

    with pytest.raises(VerificationError, match=r"Rewriter\.exchange got .*" + words):
        compile_small(module(), extra_passes=[wrote(step)])


def test_an_erased_call_is_not_exchanged() -> None:
    def step(rewriter: Rewriter, node: fx.Node) -> None:
        rewriter.exchange(node, aten.tanh.default, node.args)
        rewriter.exchange(node, aten.tanh.default, node.args)

    with pytest.raises(VerificationError, match="which is no node of the program's graph"):
        compile_small(module(), extra_passes=[wrote(step)])


@pytest.mark.parametrize("name", ZOO)
def test_the_packages_own_passes_write_what_their_specs_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []

    def verified(program: Program, after: str) -> None:
        verify_calls(program.graph, frozenset(), after)
        checked.append(after)

    monkeypatch.setattr("fisedit_compiler.passes.rewriting.verify", verified)
    rewrite(program_of(compiled_model(name)).captured, SparsifyConfig(cache=False))
    assert "outputs" in checked
