"""Adding to the compiler from outside: extra passes in order, layout rules, rewrites of other packages' operations."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fisedit_compiler.errors import ConfigError, LayoutError, VerificationError
from fisedit_compiler.extend import (
    Layout,
    OpTraits,
    Provider,
    Rewriter,
    copy_on_rows,
    cost_rule,
    define_op,
    elements,
    layout_rule,
    no_products,
    op_traits,
    opaque,
    rewrite_rule,
)
from fisedit_compiler.graph.layout_rules import LAYOUT_RULES
from fisedit_compiler.graph.sizes import BATCH, HEIGHT, WIDTH, row_symbol
from fisedit_compiler.inspect.costs import graph_cost, node_cost
from fisedit_compiler.kernels.traits import TRAITS, inlined, traits_of
from fisedit_compiler.lowering.cut_products import cut_products, linear
from fisedit_compiler.passes.order import REWRITES
from fisedit_compiler.passes.rewrites.extensions import RULES
from tests.support.pass_tools import CHANNELS, Forward, assert_equals_oracle, compile_small, counts, program_of, reasons

NAMES = [rewrite.name for rewrite in REWRITES]


@torch.library.custom_op("fisedit_tests::halve", mutates_args=())
def halve(tokens: Tensor) -> Tensor:
    return tokens * 0.5


@halve.register_fake
def _(tokens: Tensor) -> Tensor:
    return torch.empty_like(tokens)


OPERATION = torch.ops.fisedit_tests.halve.default


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """Rules registered by a test are forgotten after it."""
    known = [(rules, dict(rules)) for rules in (RULES, LAYOUT_RULES, TRAITS)]
    yield
    for rules, before in known:
        rules.clear()
        rules.update(before)


def module() -> nn.Module:
    return Forward(
        lambda self, x: self.out(torch.ops.fisedit_tests.halve(self.conv(x))),
        conv=nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
        out=nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
    )


def on_rows(node: fx.Node, rewriter: Rewriter) -> str | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    rows = rewriter.call(node.target, (rewriter.rows(source),), rewriter.row_spec(node), node)
    rewriter.replace(node, rows)
    return None


# -- operations ----------------------------------------------------------------------------------------


def test_an_operation_without_a_rule_runs_densely_and_says_so() -> None:
    compiled = compile_small(module())
    assert reasons(program_of(compiled)) == {"fisedit_tests.halve": "no rule for fisedit_tests.halve"}
    assert_equals_oracle(compiled)


def test_a_rewrite_rule_puts_it_on_rows() -> None:
    rewrite_rule(OPERATION)(on_rows)
    compiled = compile_small(module())
    program = program_of(compiled)
    assert not program.refusals
    assert counts(program.step)["fisedit_tests.halve"] == 1
    assert counts(program.step)["fisedit.gather_sites"] == 1, "only the sample is gathered"
    assert_equals_oracle(compiled)


@pytest.mark.parametrize(("name", "operation"), [("extensions", "fisedit_tests.halve"), ("pointwise", "aten.silu")])
def test_a_disabled_pass_is_named_though_it_has_no_table_of_operations(name: str, operation: str) -> None:
    rewrite_rule(OPERATION)(on_rows)
    mixed = Forward(lambda self, x: torch.ops.fisedit_tests.halve(torch.nn.functional.silu(self.conv(x))))
    mixed.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
    assert reasons(program_of(compile_small(mixed, disabled_passes={name}))) == {operation: f"pass {name} is disabled"}


def test_a_rule_may_refuse_with_a_reason() -> None:
    rewrite_rule(OPERATION)(lambda node, rewriter: "not on a Tuesday")
    assert reasons(program_of(compile_small(module()))) == {"fisedit_tests.halve": "extensions: not on a Tuesday"}


def test_a_layout_rule_has_the_last_word() -> None:
    @layout_rule(OPERATION)
    def mixes(node: fx.Node, inferred: Layout) -> Layout:
        assert inferred.kind == "map"
        return opaque(inferred.rank, "it reads every site")

    rewrite_rule(OPERATION)(on_rows)
    compiled = compile_small(module())
    assert reasons(program_of(compiled))["fisedit_tests.halve"] == "it reads every site"


def test_errors_name_the_rule_the_place_and_the_remedy() -> None:
    def broken(node: fx.Node, rewriter: Rewriter) -> str | None:
        raise ZeroDivisionError("oh")

    def forgetful(node: fx.Node, rewriter: Rewriter) -> str | None:
        return None

    for rule, message in ((broken, "broken failed on .*ZeroDivisionError: oh.*Mend"), (forgetful, "forgetful left")):
        RULES.clear()
        rewrite_rule(OPERATION)(rule)
        with pytest.raises(VerificationError, match=f"(?s){message}") as caught:
            compile_small(module())
        assert "fisedit_tests.halve" in str(caught.value) and "pass_tools.py:" in str(caught.value)
    RULES.clear()
    layout_rule(OPERATION)(lambda node, inferred: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(LayoutError, match=r"gave None for .*whose value has 4 axes"):
        compile_small(module())


def test_an_operation_has_one_rule() -> None:
    rewrite_rule(OPERATION)(on_rows)
    rewrite_rule(OPERATION)(on_rows)  # the same one again, as a reloaded module does
    with pytest.raises(ConfigError, match=r"has a rewrite rule already: .*on_rows"):
        rewrite_rule(OPERATION)(lambda node, rewriter: None)


@pytest.mark.parametrize(
    "wrong", [torch.ops.fisedit_tests.halve, torch.relu, "mylib::gate"], ids=["packet", "function", "name"]
)
def test_what_is_no_operation_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"is for one operation, such as torch.ops.mylib.scale.default"):
        layout_rule(wrong)


# -- the worked example --------------------------------------------------------------------------------


def load_example(name: str) -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_the_example_adds_an_operation_from_outside(capsys: pytest.CaptureFixture[str]) -> None:
    load_example("third_party_op").main()
    printed = capsys.readouterr().out
    assert "outside the mask the same bits: True" in printed
    assert "mylib.gate(" in printed and "no rule" not in printed
    (row,) = (line for line in printed.splitlines() if "mylib.gate" in line and "one_matrix" in line)
    assert "uncounted" not in printed and "for want of a formula" not in printed and row


# -- costs -----------------------------------------------------------------------------------------------


def costs_of_halving() -> list[Any]:
    """What the operation costs in the dense graph, and on rows."""
    rewrite_rule(OPERATION)(on_rows)
    program = program_of(compile_small(module()))
    graphs = (program.captured.graph, program.step)
    return [node_cost(node) for graph in graphs for node in graph.nodes if node.target is OPERATION]


def test_a_cost_rule_serves_the_operation_dense_and_on_rows() -> None:
    cost_rule(OPERATION)(lambda arguments, result: 7 * elements(arguments[0].shape))
    dense, rows = costs_of_halving()
    sites, active = BATCH * CHANNELS * HEIGHT * WIDTH, BATCH * CHANNELS * row_symbol(Fraction(1))
    assert (dense.flops, dense.nbytes, dense.uncounted) == (7 * sites, 8 * sites, ()), "bytes: read once, written once"
    assert (rows.flops, rows.nbytes, rows.uncounted) == (7 * active, 8 * active, ())


def test_a_cost_rule_may_give_bytes_too() -> None:
    cost_rule(OPERATION)(lambda arguments, result: (0, 100))
    assert all((cost.flops, cost.nbytes) == (0, 100) for cost in costs_of_halving())


def test_explain_counts_what_has_a_rule_and_names_what_has_none() -> None:
    rewrite_rule(OPERATION)(on_rows)
    compiled = compile_small(module())
    mask = torch.ones(12, 20, dtype=torch.bool)

    def explained() -> tuple[set[str], list[int]]:
        (program,) = compiled.explain(mask).programs
        uncounted = {name for work in program.work for name in work.cost.uncounted}
        return uncounted, [
            work.cost.flops.subs({BATCH: 1, HEIGHT: 2, WIDTH: 3, row_symbol(Fraction(1)): 6}) for work in program.work
        ]

    names, flops = explained()
    assert names == {"fisedit_tests.halve"}
    cost_rule(OPERATION)(lambda arguments, result: 10**6 * elements(result.shape))
    names_now, flops_now = explained()
    assert not names_now
    added = {now - then for now, then in zip(flops_now, flops, strict=True)}
    assert added == {0, 10**6 * CHANNELS * 6}, "dense and step got it, bundles of hoisted values did not"


def test_a_cost_rule_that_gives_no_cost_is_named() -> None:
    cost_rule(OPERATION)(lambda arguments, result: "many")
    with pytest.raises(ConfigError, match=r"The cost rule .*lambda.* gave 'many' for halve.*must give FLOPs"):
        costs_of_halving()


def test_a_cost_rule_says_nothing_about_the_other_traits() -> None:
    attention = torch.ops.aten.scaled_dot_product_attention.default
    cost_rule(attention)(lambda arguments, result: 0)
    assert traits_of(attention).reads_whole
    op_traits(OPERATION, OpTraits(reads_whole=True))
    cost_rule(OPERATION)(lambda arguments, result: 3)
    assert traits_of(OPERATION).reads_whole and [cost.flops for cost in costs_of_halving()] == [3, 3]


# -- traits and providers --------------------------------------------------------------------------------


def seven(arguments: list[Any], result: Any) -> int:
    return 7


def test_traits_are_what_costs_and_lowering_go_by() -> None:
    def cut_layers() -> int:
        """How many linear layers that the operation reads are cut into parts."""
        graph = fx.Graph()
        rows, weight = graph.placeholder("rows"), graph.placeholder("weight")
        product = graph.call_function(torch.ops.aten.linear.default, (rows, weight))
        graph.output(graph.call_function(OPERATION, (product,)))
        cut_products(graph)
        return sum(node.target is linear for node in graph.nodes)

    assert cut_layers() == 1 and OPERATION not in inlined()
    op_traits(OPERATION, OpTraits(flops=seven, reads_whole=True, inline=lambda tokens: tokens / 2))
    assert cut_layers() == 0
    assert [cost.flops for cost in costs_of_halving()] == [7, 7]
    traced = make_fx(OPERATION, decomposition_table=inlined())(torch.ones(3))
    assert {node.target for node in traced.graph.nodes if node.op == "call_function"} == {torch.ops.aten.div.Tensor}


def test_an_operation_has_traits_once() -> None:
    op_traits(OPERATION, OpTraits(flops=seven))
    op_traits(OPERATION, OpTraits(flops=seven))  # the same again, as a reloaded module does
    with pytest.raises(ConfigError, match=r"halve.* has traits already: OpTraits\(.*Register one of them"):
        op_traits(OPERATION, OpTraits(flops=no_products))
    with pytest.raises(ConfigError, match=r"has a cost rule already: .*seven"):
        cost_rule(OPERATION)(lambda arguments, result: 8)
    with pytest.raises(ConfigError, match=r"Traits are for one operation, .* \(name its overload: .default\)"):
        op_traits(torch.ops.fisedit_tests.halve, OpTraits())


DOUBLE = define_op(
    "fisedit_tests::double(Tensor tokens) -> Tensor",
    lambda tokens: tokens * 2,
    torch.empty_like,
    traits=OpTraits(flops=no_products),
    providers=[
        Provider("tiny", "CPU", lambda tokens: tokens + tokens, supports=lambda tokens: "it is never tiny enough"),
        Provider("added", "CPU", lambda tokens: tokens + tokens),
        Provider("elsewhere", "CUDA", lambda tokens: tokens),
    ],
)


def test_a_defined_operation_is_computed_by_its_provider_and_explain_says_why() -> None:
    @rewrite_rule(DOUBLE.overload)
    def doubled_rows(node: fx.Node, rewriter: Rewriter) -> str | None:
        (tokens,) = node.all_input_nodes
        copy_on_rows(node, {tokens: rewriter.rows(tokens)}, rewriter)
        return None

    compiled = compile_small(Forward(lambda self, x: self.conv(DOUBLE(x)), conv=nn.Conv2d(CHANNELS, CHANNELS, 1)))
    assert not program_of(compiled).refusals and not graph_cost(program_of(compiled).step).uncounted
    explanation = compiled.explain(torch.ones(12, 20, dtype=torch.bool))
    (row,) = (row for row in explanation.programs[0].kernels if row.operation == "fisedit_tests.double")
    assert (row.runs, row.calls, row.passed_over) == ("added", 1, {"tiny": "it is never tiny enough"})
    assert "tiny: it is never tiny enough" in str(explanation)
    (told,) = (row for row in explanation.to_dict()["programs"][0]["kernels"] if row["runs"] == "added")
    assert told["passed_over"] == {"tiny": "it is never tiny enough"}
    assert_equals_oracle(compiled)


@pytest.mark.parametrize("name", ["scale", "fisedit::scale", "aten::scale", "::scale"])
def test_an_operation_needs_the_namespace_of_its_package(name: str) -> None:
    with pytest.raises(ConfigError, match=r"needs the namespace of its package, such as mylib::scale\("):
        define_op(f"{name}(Tensor x) -> Tensor", torch.relu, torch.empty_like, traits=OpTraits())
