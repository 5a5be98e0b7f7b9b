"""Products cut into parts: which are cut, and that a step computes the same with them."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fisedit_compiler.graph.ir import copy_graph
from fisedit_compiler.kernels.conv2d_sites import conv2d_sites
from fisedit_compiler.kernels.tolerances import assert_close
from fisedit_compiler.lowering import cut_products
from fisedit_compiler.lowering.cut_products import cut_products as cut_in_place
from fisedit_compiler.lowering.stage import stage
from tests.kernels.tables import Geometry, brute_force_taps, pick
from tests.support.compiled_zoo import compiled_model, make_mask, record_run
from tests.support.pass_tools import (
    Forward,
    StepCall,
    TextForward,
    compile_small,
    example,
    program_of,
    step_call,
    zoo_step_call,
)

aten = torch.ops.aten
fisedit = torch.ops.fisedit
NAMES = ("sd15", "sdxl", "scale_shift", "plain_conv", "vae_decoder")
SIZE = (8, 24)
LINEAR = aten.linear.default
CONVOLUTION = fisedit.conv2d_sites.default
ATTENTION = (
    aten.scaled_dot_product_attention.default,
    fisedit.attention_addressed.default,
    fisedit.attention_rows.default,
    fisedit.attention_sites.default,
    fisedit.cross_attention.default,
)


@pytest.fixture
def small_layers_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """The zoo's layers have a handful of inputs, and all that can are cut."""
    monkeypatch.setattr(cut_products, "choose_parts", lambda inputs, outputs: 4 if inputs % 4 == 0 else 1)


@pytest.fixture
def nothing_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut_products, "choose_parts", lambda inputs, outputs: 1)


class Calls(TorchDispatchMode):
    """Counts the ops that a graph calls, not those that ops call."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func] += 1
        return func(*args, **(kwargs or {}))


def cut(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph with its products cut."""
    result = copy_graph(graph)
    cut_in_place(result)
    return result


def targets(graph: fx.Graph) -> Counter[Any]:
    return Counter(node.target for node in graph.nodes if node.op == "call_function")


@cache
def call_of(name: str, kind: str, block_size: int | None = None, padding: bool = False) -> StepCall:
    return zoo_step_call(name, make_mask(kind, SIZE, seed=5), block_size=block_size, padding=padding)


def assert_same_results(call: StepCall, graph: fx.Graph) -> Counter[Any]:
    """The cut step against the step, to the tolerance of float32; which ops the cut one called."""
    with Calls() as calls:
        results = call.run(cut(graph))
    for actual, expected in zip(results, call.run(graph), strict=True):
        assert_close(actual, expected, torch.float32)
    return calls.counts


# -- results ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_layers_are_cut")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["site", "scattered", "block", "full"])
def test_a_step_computes_the_same(name: str, kind: str) -> None:
    call = call_of(name, kind)
    step = call.executable.program.step
    called = assert_same_results(call, step)
    convolutions = targets(step)[CONVOLUTION]
    # The first convolution of the UNets reads 3x3 taps of 4 channels, the others more: all are multiples of four.
    assert called[fisedit.convolve_parts.default] == convolutions > 0 and called[CONVOLUTION] == 0
    assert called[fisedit.matmul_parts.default] == targets(cut(step))[cut_products.linear] > 0


@pytest.mark.usefixtures("small_layers_are_cut")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("padding", [False, True], ids=["plain", "padded"])
def test_a_staged_step_computes_the_same(name: str, padding: bool) -> None:
    """What a GPU runs: the cut comes last."""
    for kind in ("scattered", "full"):
        call = call_of(name, kind, padding=padding)
        called = assert_same_results(call, stage(call.executable.program.step, call.executable.slot_names))
        assert called[fisedit.convolve_parts.default] > 0 and called[fisedit.matmul_parts.default] > 0


@pytest.mark.usefixtures("small_layers_are_cut")
@pytest.mark.parametrize("name", ["sd15", "plain_conv"])
@pytest.mark.parametrize("block_size", [1, 2, 4, 8])
def test_a_step_in_blocks_computes_the_same(name: str, block_size: int) -> None:
    call = call_of(name, "scattered", block_size)
    called = assert_same_results(call, call.executable.program.step)
    assert called[fisedit.convolve_parts.default] > 0


@pytest.mark.usefixtures("nothing_is_cut")
@pytest.mark.parametrize("name", NAMES)
def test_where_nothing_is_cut_a_step_computes_the_same(name: str) -> None:
    for kind in ("site", "block"):
        call = call_of(name, kind)
        called = assert_same_results(call, call.executable.program.step)
        assert called[CONVOLUTION] == targets(call.executable.program.step)[CONVOLUTION] > 0
        assert called[fisedit.convolve_parts.default] == 0


@pytest.mark.usefixtures("nothing_is_cut")
def test_convolutions_that_stay_whole_give_the_same_bits() -> None:
    layers = {f"conv{index}": nn.Conv2d(8, 8, 3, padding=1) for index in range(2)}
    module = Forward(lambda m, x: x + m.conv1(F.silu(m.conv0(x))), **layers)
    compiled = compile_small(module, dense_above=1.0)
    base, changed, step = record_run(compiled, example(module)), example(module, seed=1), program_of(compiled).step
    assert targets(cut(step))[cut_products.convolution] == 2
    for kind in ("site", "scattered", "full"):
        mask = make_mask(kind, (12, 20))
        edit = {"sample": torch.where(mask, changed["sample"], base.inputs["sample"])}
        call = step_call(compiled, base, edit, mask)
        for actual, expected in zip(call.run(cut(step)), call.run(step), strict=True):
            assert torch.equal(actual, expected)


# -- which are cut ---------------------------------------------------------------------------------


def projections(attention: fx.Node) -> set[fx.Node]:
    """The linear layers whose results are the rows that attention reads, reordered and split at most."""
    found, seen = set(), [node for node in attention.args[:3] if isinstance(node, fx.Node)]
    while seen:
        node = seen.pop()
        if node.target is LINEAR:
            found.add(node)
        elif node.op == "call_function" and len(node.all_input_nodes) <= 2:  # a view and its size
            seen.extend(node.all_input_nodes[:1])
    return found


@pytest.mark.parametrize("staged", [False, True], ids=["step", "staged"])
@pytest.mark.parametrize("name", NAMES)
def test_what_attention_reads_stays_whole(name: str, staged: bool) -> None:
    (program,) = compiled_model(name).programs
    step = stage(program.step, [slot.name for slot in program.slots]) if staged else copy_graph(program.step)
    attention = [node for node in step.nodes if node.target in ATTENTION]
    kept = set().union(*map(projections, attention))
    linears = {node for node in step.nodes if node.target is LINEAR}
    convolutions = {node for node in step.nodes if node.target is CONVOLUTION}
    assert len(kept) == len(attention), "queries, keys and values are one product; a text's are hoisted"
    before = [(node.args, node.kwargs) for node in step.nodes]
    cut_in_place(step)
    assert {node for node in step.nodes if node.target is LINEAR} == kept
    assert {node for node in step.nodes if node.target is cut_products.linear} == linears - kept
    assert {node for node in step.nodes if node.target is cut_products.convolution} == convolutions
    assert [(node.args, node.kwargs) for node in step.nodes] == before


def small_step(function: Callable[..., Tensor], text: bool = False, **options: Any) -> fx.Graph:
    """The cut step of a small module with a convolution and four linear layers."""
    layers: dict[str, nn.Module] = {name: nn.Linear(8, 8) for name in ("q", "k", "v", "out")}
    build = TextForward if text else Forward
    module = build(function, conv=nn.Conv2d(8, 8, 3, padding=1), **layers)
    return cut(program_of(compile_small(module, **options)).step)


def tokens_of(module: Any, x: Tensor) -> Tensor:
    return module.conv(x).flatten(2).transpose(1, 2)


def heads(tokens: Tensor) -> Tensor:
    return tokens.unflatten(-1, (2, 4)).transpose(1, 2)


@pytest.mark.parametrize("attention", ["cached", "active"])
@pytest.mark.parametrize("merged", [True, False], ids=["merged", "siblings"])
def test_projections_of_self_attention_stay_whole_its_output_is_cut(attention: str, merged: bool) -> None:
    def forward(module: Any, x: Tensor) -> Tensor:
        tokens = tokens_of(module, x)
        query, key, value = (heads(getattr(module, name)(tokens)) for name in ("q", "k", "v"))
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return x + module.out(mixed).transpose(1, 2).reshape(x.shape)

    disabled = set() if merged else {"merge_linears"}
    after = targets(small_step(forward, attention=attention, disabled_passes=disabled))
    assert after[LINEAR] == (1 if merged else 3)
    assert after[cut_products.linear] == after[cut_products.convolution] == 1


@pytest.mark.parametrize("masked", [False, True])
def test_queries_of_cross_attention_stay_whole(masked: bool) -> None:
    """Also where a mask keeps it torch's own attention."""

    def forward(module: Any, x: Tensor, text: Tensor) -> Tensor:
        query, key, value = heads(module.q(tokens_of(module, x))), heads(module.k(text)), heads(module.v(text))
        mask = (text.mean(-1) > -1.0)[:, None, None, :] if masked else None
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
        return x + module.out(mixed).transpose(1, 2).reshape(x.shape)

    after = targets(small_step(forward, text=True))
    assert after[ATTENTION[0]] == masked and after[fisedit.cross_attention.default] == (not masked)
    assert after[LINEAR] == after[cut_products.linear] == 1


def test_linears_that_are_added_normalised_or_activated_are_cut() -> None:
    def forward(module: Any, x: Tensor) -> Tensor:
        tokens = tokens_of(module, x)
        tokens = tokens + module.q(tokens)
        tokens = F.layer_norm(module.k(tokens), (8,))
        first, second = module.v(tokens).chunk(2, dim=-1)
        tokens = torch.cat([first * F.gelu(second), second], -1)
        return x + F.silu(module.out(tokens)).transpose(1, 2).reshape(x.shape)

    after = targets(small_step(forward))
    assert after[LINEAR] == 0 and after[cut_products.linear] == 4


SEEN_THROUGH: dict[str, Callable[[fx.Graph, fx.Node], fx.Node]] = {
    "nothing": lambda graph, node: node,
    "view": lambda graph, node: graph.call_function(aten.view.default, (node, [2, -1, 2, 4])),
    "reshape": lambda graph, node: graph.call_function(aten.reshape.default, (node, [2, -1, 2, 4])),
    "unflatten": lambda graph, node: graph.call_function(aten.unflatten.int, (node, 2, [2, 4])),
    "transpose": lambda graph, node: graph.call_function(aten.transpose.int, (node, 1, 2)),
    "permute": lambda graph, node: graph.call_function(aten.permute.default, (node, [0, 2, 1])),
    "split": lambda graph, node: graph.call_function(
        operator.getitem, (graph.call_function(aten.split_with_sizes.default, (node, [4, 4], 2)), 1)
    ),
}
FUSED: dict[str, Callable[[fx.Graph, fx.Node], fx.Node]] = {
    "add": lambda graph, node: graph.call_function(aten.add.Tensor, (node, 1.0)),
    "layer_norm": lambda graph, node: graph.call_function(aten.layer_norm.default, (node, [8])),
    "silu": lambda graph, node: graph.call_function(aten.silu.default, (node,)),
}


def one_linear(*between: Callable[[fx.Graph, fx.Node], fx.Node], attention: Any, operand: int = 0) -> fx.Graph:
    """A graph of one linear layer whose result attention reads, with some operations between, and nobody else."""
    graph = fx.Graph()
    x, weight, *others = (graph.placeholder(name) for name in ("x", "weight", "first", "second"))
    read = graph.call_function(LINEAR, (x, weight))
    for operation in between:
        read = operation(graph, read)
    operands = [*others[:operand], read, *others[operand:]]
    graph.output(graph.call_function(attention, tuple(operands)))
    return graph


@pytest.mark.parametrize("attention", ATTENTION, ids=str)
@pytest.mark.parametrize("operand", range(3), ids=["query", "key", "value"])
def test_every_attention_reads_whole_products(attention: Any, operand: int) -> None:
    assert targets(cut(one_linear(attention=attention, operand=operand)))[LINEAR] == 1


@pytest.mark.parametrize("first", SEEN_THROUGH)
@pytest.mark.parametrize("second", SEEN_THROUGH)
def test_attention_reads_through_views_and_splits(first: str, second: str) -> None:
    graph = one_linear(SEEN_THROUGH[first], SEEN_THROUGH[second], attention=ATTENTION[-1])
    assert targets(cut(graph))[LINEAR] == 1


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("view", SEEN_THROUGH)
def test_what_a_kernel_adds_up_before_attention_is_cut(fused: str, view: str) -> None:
    graph = one_linear(SEEN_THROUGH[view], FUSED[fused], SEEN_THROUGH[view], attention=ATTENTION[-1])
    assert targets(cut(graph))[cut_products.linear] == 1


def test_one_reader_that_wants_it_whole_is_enough() -> None:
    graph = one_linear(SEEN_THROUGH["view"], attention=ATTENTION[-1])
    (output,) = (node for node in graph.nodes if node.op == "output")
    (product,) = (node for node in graph.nodes if node.target is LINEAR)
    with graph.inserting_before(output):
        added = graph.call_function(aten.add.Tensor, (product, 1.0))
    output.args = ((output.args[0], added),)
    assert targets(cut(graph))[LINEAR] == 1


# -- the cut operations ----------------------------------------------------------------------------


@pytest.mark.usefixtures("small_layers_are_cut")
@pytest.mark.parametrize("leading", [(5,), (2, 5), (2, 0), (2, 3, 5), ()], ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("inputs", [8, 9], ids=["cut", "whole"])
def test_a_linear(leading: tuple[int, ...], biased: bool, inputs: int) -> None:
    rows, weight = torch.randn(*leading, inputs), torch.randn(7, inputs)
    bias = torch.randn(7) if biased else None
    with Calls() as calls:
        actual = cut_products.linear(rows, weight, bias)
    if inputs == 8:
        assert calls.counts[fisedit.matmul_parts.default] == 1
    expected = F.linear(rows.double(), weight.double(), None if bias is None else bias.double())
    assert_close(actual, expected, torch.float32)
    if inputs == 9 and not biased:
        assert torch.equal(actual, F.linear(rows, weight))


@pytest.mark.usefixtures("small_layers_are_cut")
@pytest.mark.parametrize("count", [0, 1, 9])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("channels", [8, 5], ids=["cut", "whole"])
def test_a_convolution(count: int, biased: bool, channels: int) -> None:
    """Where it stays whole, the same bits."""
    active = pick(24, count)
    ring, taps = brute_force_taps(Geometry(4, 6), active, active)
    rows, canvas = torch.randn(2, count, channels), torch.randn(2, 24, channels)
    weight, bias = torch.randn(7, 9 * channels), torch.randn(7) if biased else None
    arguments = (rows, canvas, ring, taps, torch.arange(count), weight, bias, (3, 3))
    with Calls() as calls:
        actual = cut_products.convolution(*arguments)
    expected = conv2d_sites(*arguments)
    assert calls.counts[fisedit.convolve_parts.default] == (channels == 8)
    if channels == 8:
        assert_close(actual, expected, torch.float32)
    else:
        assert torch.equal(actual, expected)


@pytest.mark.usefixtures("small_layers_are_cut")
def test_compiled_once_for_every_number_of_rows() -> None:
    """In how many parts is decided by the weight alone."""
    graphs: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, inputs: list[Tensor]) -> fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(cut_products.linear, backend=backend, fullgraph=True, dynamic=True)
    weight, bias = torch.randn(7, 8), torch.randn(7)
    for count in (3, 5, 11):
        rows = torch.randn(2, count, 8)
        assert torch.equal(compiled(rows, weight, bias), cut_products.linear(rows, weight, bias))
    assert len(graphs) == 1
