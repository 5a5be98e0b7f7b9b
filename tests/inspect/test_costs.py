"""FLOPs and bytes from formulas: FLOPs equal those that torch counts in a run, of the dense call and of the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fisedit_compiler import SparseModule
from fisedit_compiler.inspect import costs
from fisedit_compiler.inspect.costs import Cost, call_sizes, graph_cost, node_cost, placeholder_specs, plan_sizes
from tests.support.compiled_zoo import base_inputs, base_run, compiled_model, edit_inputs, make_mask, zoo_model
from tests.support.flops import counted
from tests.support.pass_tools import (
    CHANNELS,
    Forward,
    captured_graph,
    compile_small,
    program_of,
    step_call,
    zoo_step_call,
)
from tests.support.zoo import UNETS

TOKENS = 7
SIZE = (16, 24)


def dense_flops(compiled: SparseModule, batch: int, height: int, width: int) -> int:
    program = program_of(compiled)
    sizes = call_sizes(program.multiple, height, width, batch, TOKENS)
    return graph_cost(program.captured.graph).at(sizes)[0]


def hoisted_flops(compiled: SparseModule, batch: int, height: int, width: int) -> int:
    program = program_of(compiled)
    sizes = call_sizes(program.multiple, height, width, batch, TOKENS)
    graphs = [bundle.graph for bundle in program.bundles]
    specs = placeholder_specs(program.captured.graph, graphs)
    return sum(graph_cost(graph, specs).at(sizes)[0] for graph in graphs)


@pytest.mark.parametrize("name", [*UNETS, "vae_decoder", "plain_conv", "reflect"])
@pytest.mark.parametrize(("batch", "size"), [(2, (16, 24)), (1, (8, 12))])
def test_flops_of_a_dense_call_are_those_torch_counts(name: str, batch: int, size: tuple[int, int]) -> None:
    model, inputs = zoo_model(name), base_inputs(name, batch, size)
    assert dense_flops(compiled_model(name), batch, *size) == counted(lambda: model.module(**inputs)) > 0


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("kind", ["scattered", "block", "full"])
@pytest.mark.parametrize("block_size", [1, 4])
def test_flops_of_a_step_are_those_torch_counts(name: str, kind: str, block_size: int) -> None:
    call = zoo_step_call(name, make_mask(kind, SIZE, seed=3), block_size=block_size)
    program = call.executable.program
    sizes = {**call_sizes(program.multiple, *SIZE, 2, TOKENS), **plan_sizes(program.step, call.plan)}
    assert graph_cost(program.step).at(sizes)[0] == counted(lambda: call.run(program.step)) > 0


def test_flops_of_attention_among_active_sites_only() -> None:
    mask = make_mask("block", SIZE, seed=3)
    base = base_run("sd15", "recorded", "active", 2, SIZE)
    compiled = compiled_model("sd15", "recorded", "active")
    call = step_call(compiled, base, edit_inputs("sd15", 2, SIZE, mask), mask, block_size=1)
    program = call.executable.program
    sizes = {**call_sizes(program.multiple, *SIZE, 2, TOKENS), **plan_sizes(program.step, call.plan)}
    assert graph_cost(program.step).at(sizes)[0] == counted(lambda: call.run(program.step))


@pytest.mark.parametrize("name", UNETS)
def test_a_full_mask_costs_what_the_dense_call_costs_without_what_is_hoisted(name: str) -> None:
    compiled = compiled_model(name)
    call = zoo_step_call(name, make_mask("full", SIZE, seed=0), block_size=1)
    program = program_of(compiled)
    sizes = {**call_sizes(program.multiple, *SIZE, 2, TOKENS), **plan_sizes(program.step, call.plan)}
    step = graph_cost(program.step).at(sizes)[0]
    assert step + hoisted_flops(compiled, 2, *SIZE) == dense_flops(compiled, 2, *SIZE)


PRODUCTS: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, nn.Module]]] = {
    "grouped_convolution": (lambda m, x: m.conv(x), {"conv": nn.Conv2d(CHANNELS, 12, (3, 1), padding=1, groups=4)}),
    "strided_convolution": (lambda m, x: m.conv(x), {"conv": nn.Conv2d(CHANNELS, 6, 3, 2, 1)}),
    "transposed_convolution": (lambda m, x: m.conv(x), {"conv": nn.ConvTranspose2d(CHANNELS, 6, 2, 2)}),
    "linear": (lambda m, x: m.linear(x.permute(0, 2, 3, 1)), {"linear": nn.Linear(CHANNELS, 5)}),
    "matmul": (lambda m, x: x.permute(0, 2, 3, 1) @ m.linear.weight.t(), {"linear": nn.Linear(CHANNELS, 5)}),
    "bmm": (lambda m, x: torch.bmm(x.flatten(2), x.flatten(2).transpose(1, 2)), {}),
    "mm": (lambda m, x: torch.mm(m.linear.weight, m.linear.weight.t()) + x.mean(), {"linear": nn.Linear(8, 5)}),
    "attention": (lambda m, x: F.scaled_dot_product_attention(*[x.flatten(2).transpose(1, 2)[:, None]] * 3), {}),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_every_kind_of_product(name: str) -> None:
    function, layers = PRODUCTS[name]
    module = Forward(function, **layers).eval()
    sizes = call_sizes(2, 12, 20, 2, 0)
    sample = torch.randn(2, CHANNELS, 12, 20)
    cost = graph_cost(captured_graph(module, multiple=2).graph)
    assert cost.at(sizes)[0] == counted(lambda: module(sample)) > 0
    assert not cost.uncounted


def nodes_of(module: nn.Module) -> list[fx.Node]:
    return [node for node in captured_graph(module).graph.nodes if node.op == "call_function"]


def test_bytes_are_what_is_read_and_written_once() -> None:
    (add,) = nodes_of(Forward(lambda m, x: x + x))
    assert node_cost(add).at(call_sizes(1, 4, 6, 2, 0)) == (0, 2 * 2 * CHANNELS * 4 * 6 * 4)
    (convolution,) = nodes_of(Forward(lambda m, x: m.conv(x), conv=nn.Conv2d(CHANNELS, 3, 1)))
    weights = 3 * CHANNELS + 3
    assert node_cost(convolution).at(call_sizes(1, 4, 6, 2, 0))[1] == 4 * (2 * 4 * 6 * (CHANNELS + 3) + weights)


def test_views_and_sizes_cost_nothing() -> None:
    module = Forward(lambda m, x: x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, CHANNELS).chunk(2, -1)[0])
    assert all(node_cost(node) == Cost() for node in nodes_of(module))


def test_an_operation_without_a_formula_counts_bytes_and_is_named() -> None:
    (cumsum,) = nodes_of(Forward(lambda m, x: torch.cumsum(x, -1)))
    cost = node_cost(cumsum)
    assert cost.uncounted == ("aten.cumsum",)
    assert cost.at(call_sizes(1, 4, 6, 2, 0)) == (0, 2 * 2 * CHANNELS * 4 * 6 * 4)


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("norm", ["recorded", "incremental"])
def test_every_operation_of_a_unet_has_a_formula(name: str, norm: Any) -> None:
    program = program_of(compiled_model(name, norm))
    graphs = [bundle.graph for bundle in program.bundles]
    specs = placeholder_specs(program.captured.graph, graphs)
    for graph in (program.captured.graph, program.step, *graphs):
        assert not graph_cost(graph, specs).uncounted


def test_a_convolution_on_rows_reads_of_its_canvas_the_ring() -> None:
    compiled = compile_small(Forward(lambda m, x: m.conv(x), conv=nn.Conv2d(CHANNELS, 6, 3, padding=1)), block_size=1)
    program = program_of(compiled)
    (convolution,) = (n for n in program.step.nodes if n.target is torch.ops.fisedit.conv2d_sites.default)
    (executable,) = compiled._programs.executables()
    mask = make_mask("block", (12, 20), seed=3)
    plan = executable.plans.of(mask, 0, torch.zeros(2, CHANNELS, 12, 20))
    ((key, ring),) = plan.ring.items()
    rows = int(mask.sum())
    tables = 8 * (ring.numel() + plan.taps[key].numel() + rows)
    values = 4 * (2 * (rows + ring.numel()) * CHANNELS + 2 * rows * 6 + 6 * 9 * CHANNELS + 6)
    sizes = {**call_sizes(1, 12, 20, 2, 0), **plan_sizes(program.step, plan)}
    assert node_cost(convolution).at(sizes) == (2 * 2 * rows * 6 * 9 * CHANNELS, values + tables)


def test_a_size_that_is_not_given_is_asked_for() -> None:
    program = program_of(compiled_model("sd15"))
    with pytest.raises(ValueError, match=r"needs .*'n_1'"):
        graph_cost(program.step).at(call_sizes(program.multiple, *SIZE, 2, TOKENS))
    assert costs.evaluate(costs.ZERO, {}) == 0
