"""Lowered graphs handed to Inductor without Dynamo: one code for every mask, the same results, refusals, the cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from fisedit_compiler.graph.inputs import Sources, graph_inputs, resolve
from fisedit_compiler.kernels.addresses import address_table
from fisedit_compiler.kernels.tolerances import assert_close
from fisedit_compiler.lowering.codegen import direct, inductor
from fisedit_compiler.lowering.codegen.direct import DirectStep, NotDirect
from fisedit_compiler.lowering.codegen.inductor import compile_dense, compile_step, directly
from fisedit_compiler.lowering.codegen.lengths import lengths
from fisedit_compiler.lowering.regions import region_of
from tests.lowering.test_repeated import INVOKE, NORMS, call_of, regions_of
from tests.support.pass_tools import StepCall

aten = torch.ops.aten
KINDS = ("scattered", "block", "row")


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """What Inductor is given; it is run as it is."""
    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[[list[Any]], Any]:
        graphs.append(graph)
        return lambda arguments: graph(*arguments)

    monkeypatch.setattr(direct, "_compile_traced", keep)
    return graphs


def arguments_of(call: StepCall, graph: fx.Graph) -> list[Any]:
    addresses = address_table(list(call.slots.values()), torch.device("cpu"))
    return resolve(graph_inputs(graph), Sources(call.call, call.slots, call.hoisted, call.plan, addresses=addresses))


def graph_of(function: Callable[[fx.Graph, list[fx.Node]], Any], inputs: int, **weights: Tensor) -> fx.GraphModule:
    """A graph of some inputs and weights, from what is computed of them."""
    graph = fx.Graph()
    nodes = [graph.placeholder(f"input{number}") for number in range(inputs)]
    nodes += [graph.get_attr(name) for name in weights]
    graph.output((function(graph, nodes),))
    module = nn.Module()
    for name, weight in weights.items():
        module.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    return fx.GraphModule(module, graph)


def product() -> fx.GraphModule:
    return graph_of(
        lambda graph, nodes: graph.call_function(aten.linear.default, tuple(nodes)), 1, weight=torch.randn(5, 8)
    )


# -- results ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["sd15", "plain_conv"])
def test_one_code_serves_every_mask(name: str, norm: str, traced: list[fx.GraphModule]) -> None:
    first = call_of(name, KINDS[0], norm)
    lowered = first.executable.program.lowered("update")
    step = directly(first.executable._bind(lowered))
    for kind in KINDS:
        call = call_of(name, kind, norm)
        results = step(*arguments_of(call, lowered))
        for actual, expected in zip(results, call.run(call.executable.program.update), strict=True):
            assert_close(actual, expected, torch.float32)
    (graph,) = traced
    invoked = Counter(node.args[0].target for node in graph.graph.nodes if node.target is INVOKE)
    assert sorted(invoked.values()) == sorted(regions_of(lowered).values())


def test_equal_lengths_are_one_symbol(traced: list[fx.GraphModule]) -> None:
    call = call_of("sd15", "block", "incremental")
    lowered = call.executable.program.lowered("update")
    names = {name for node in lowered.find_nodes(op="placeholder") for name in lengths(node).values()}
    directly(call.executable._bind(lowered))(*arguments_of(call, lowered))
    inputs = [node.meta["val"] for node in traced[0].graph.find_nodes(op="placeholder")]
    symbols = [value for value in inputs if isinstance(value, torch.SymInt)]
    of_tensors = {
        str(size) for value in inputs if isinstance(value, Tensor) for size in value.shape if not isinstance(size, int)
    }
    assert len(symbols) == len(names) and of_tensors == set(map(str, symbols))


def test_a_length_that_contradicts_another_is_refused(traced: list[fx.GraphModule]) -> None:
    call = call_of("sd15", "block")
    lowered = call.executable.program.lowered("step")
    arguments = arguments_of(call, lowered)
    counted = [lengths(node).keys() for node in lowered.find_nodes(op="placeholder")]
    position = counted.index({1})  # rows of a ring
    arguments[position] = torch.cat([arguments[position]] * 2, 1)
    with pytest.raises(NotDirect, match=r"is .* in one argument and .* in another"):
        directly(call.executable._bind(lowered))(*arguments)


# -- sizes that are no mask's ----------------------------------------------------------------------


def test_sizes_are_numbers_until_they_change(traced: list[fx.GraphModule]) -> None:
    step = directly(product())
    for rows in (3, 4, 7, 3, 9):
        value = torch.randn(rows, 8)
        assert torch.equal(step(value)[0], value @ step._step.weight.T)
    assert [len(graph.graph.find_nodes(op="placeholder")) for graph in traced] == [2, 3]


def test_another_layout_dtype_or_offset_has_code_of_its_own(traced: list[fx.GraphModule]) -> None:
    step = directly(graph_of(lambda graph, nodes: graph.call_function(aten.mul.Tensor, (nodes[0], 2)), 1))
    values = torch.randn(4, 4)
    forms = [values, values.T, values.double(), torch.randn(17)[1:].view(4, 4)]
    for number, value in enumerate(forms, start=1):
        for _ in range(2):
            assert torch.equal(step(value)[0], value * 2)
        assert len(traced) == number


def test_what_was_taken_for_granted_is_asked_again(traced: list[fx.GraphModule]) -> None:
    """Code that chose by a size is not for sizes that would have chosen otherwise."""

    def chosen(value: Tensor) -> Tensor:
        return value * 2 if value.shape[0] < 6 else value * 3

    step = directly(graph_of(lambda graph, nodes: graph.call_function(chosen, (nodes[0],)), 1))
    for rows in (3, 4, 5, 8, 9, 4):
        value = torch.randn(rows, 8)
        assert torch.equal(step(value)[0], chosen(value))
    assert len(traced) == 3


def test_weights_are_those_of_the_moment(traced: list[fx.GraphModule]) -> None:
    module = product()
    step = directly(module)
    value = torch.randn(3, 8)
    step(value)
    module.weight = nn.Parameter(torch.randn(5, 8))
    with torch.no_grad():
        assert torch.equal(step(value)[0], value @ module.weight.T)
    assert len(traced) == 1


def test_a_batch_may_change_where_there_are_no_sites(traced: list[fx.GraphModule]) -> None:
    step = directly(graph_of(lambda graph, nodes: graph.call_function(aten.add.Tensor, tuple(nodes)), 2))
    for batch, sites in ((2, 0), (4, 0), (5, 0), (5, 3), (2, 7), (3, 0)):
        values = torch.randn(batch, sites, 3), torch.randn(sites, batch, 3).transpose(0, 1)
        assert torch.equal(step(*values)[0], sum(values))


def test_another_thread_may_call_what_torch_compiled(traced: list[fx.GraphModule]) -> None:
    compiled, zeros, ones = torch.compile(lambda value: value + 1, backend="eager"), torch.zeros(3), torch.ones(3)
    with ThreadPoolExecutor(1) as other:
        calls = [other.submit(compiled, zeros)]
        wait(calls)

        def meanwhile(value: Tensor) -> Tensor:
            calls.append(other.submit(compiled, zeros))
            wait(calls, timeout=10)
            return value * 2

        step = directly(graph_of(lambda graph, nodes: graph.call_function(meanwhile, (nodes[0],)), 1))
        assert torch.equal(step(ones)[0], ones * 2)
        assert len(calls) == 2 and all(torch.equal(call.result(), ones) for call in calls)
    assert not torch.compiler.is_compiling()


# -- what is not for it ----------------------------------------------------------------------------


class Wrapped(Tensor):
    pass


def test_what_does_not_fit_is_refused(traced: list[fx.GraphModule]) -> None:
    written = directly(graph_of(lambda graph, nodes: graph.call_function(aten.add_.Tensor, (nodes[0], 1)), 1))
    with pytest.raises(NotDirect, match="writes to an argument"):
        written(torch.ones(3))
    with pytest.raises(NotDirect, match="no plain tensor"):
        directly(product())(torch.ones(3, 8).as_subclass(Wrapped))
    with pytest.raises(NotDirect, match="gradients"):
        directly(product())(torch.ones(3, 8, requires_grad=True))
    assert not traced


@pytest.mark.parametrize("compile", [compile_step, compile_dense])
def test_torch_compile_gets_what_is_refused(compile: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def stand_in(step: fx.GraphModule, **options: Any) -> Any:
        given.append(options.get("dynamic"))
        return step

    monkeypatch.setattr(inductor.torch, "compile", stand_in)
    module = graph_of(lambda graph, nodes: graph.call_function(aten.add_.Tensor, (nodes[0], 1)), 1)
    compiled, value = compile(module), torch.zeros(3)
    for expected in (1.0, 2.0):
        assert torch.equal(compiled(value)[0], torch.full((3,), expected))
    assert given == [None if compile is compile_step else False]


@pytest.mark.parametrize("compile", [compile_step, compile_dense])
def test_torch_compile_gets_what_is_refused_after_other_calls(
    compile: Any, traced: list[fx.GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inductor.torch, "compile", lambda step, **_: step)
    compiled = compile(graph_of(lambda graph, nodes: graph.call_function(aten.mul.Tensor, (nodes[0], 2)), 1))
    for value in (torch.randn(4, 4), torch.randn(1, 4).expand(5, 4), torch.randn(1, 4).expand(6, 4), torch.randn(4, 4)):
        assert torch.equal(compiled(value)[0], value * 2)
    assert len(traced) == 1


def test_memory_that_runs_out_is_not_tried_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("1 GiB too much")

    monkeypatch.setattr(direct, "_compile_traced", full)
    monkeypatch.setattr(inductor.torch, "compile", lambda *_, **__: pytest.fail("tried another way"))
    with pytest.raises(torch.OutOfMemoryError):
        compile_step(product())(torch.ones(3, 8))


# -- Inductor itself -------------------------------------------------------------------------------


def test_inductor_keeps_the_code_on_disk() -> None:
    """For products alone, so that no C++ is compiled."""
    module = product()
    with fresh_cache():
        for found in ("fxgraph_cache_miss", "fxgraph_cache_hit"):
            counters.clear()
            step = DirectStep(module, inductor._decompositions, inductor._choices)
            for rows in (3, 4, 7):
                value = torch.randn(rows, 8)
                torch.testing.assert_close(step(value)[0], value @ module.weight.T)
            assert counters["inductor"][found] == 2, dict(counters["inductor"])


def test_regions_are_kept_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key of the cache can be made of a graph that calls regions, and of what Inductor takes apart."""
    from torch._inductor import compile_fx
    from torch._inductor.codecache import FxGraphCache

    keys = []

    def key_of(graph: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        FxGraphCache._check_can_cache(graph)
        keys.append(graph)
        return lambda arguments: graph(*arguments)

    monkeypatch.setattr(compile_fx, "compile_fx_forward", key_of)
    call = call_of("sd15", "block")
    lowered = call.executable.program.lowered("update")
    assert any(map(region_of, lowered.nodes))
    directly(call.executable._bind(lowered))(*arguments_of(call, lowered))
    assert len(keys) == 1
