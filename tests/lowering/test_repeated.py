"""Blocks of equal structure: which are found, that they are compiled once, and that nothing is computed otherwise."""

from __future__ import annotations

from collections import Counter
from functools import cache
from operator import getitem
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd

from fisedit_compiler import SparsifyConfig, sparsify
from fisedit_compiler.graph import ir
from fisedit_compiler.graph.inputs import IotaInput, RingRowsInput, Sources, TableInput, graph_inputs, resolve
from fisedit_compiler.graph.listing import listing
from fisedit_compiler.kernels.addresses import address_table
from fisedit_compiler.kernels.tolerances import assert_close
from fisedit_compiler.lowering import cut_products
from fisedit_compiler.lowering.codegen import inductor
from fisedit_compiler.lowering.codegen.inductor import compile_step
from fisedit_compiler.lowering.open_products import is_product
from fisedit_compiler.lowering.regions import Region, allow_regions, inlined, region_of, whole
from fisedit_compiler.lowering.repeated import outline_repeated
from fisedit_compiler.lowering.stage import stage
from tests.support.compiled_zoo import compiled_model, make_mask, record_run
from tests.support.graph_stand_in import refuse_directly
from tests.support.pass_tools import Forward, StepCall, compile_small, example, step_call, zoo_step_call

INVOKE = torch.ops.higher_order.invoke_subgraph
NORMS = ("recorded", "incremental")
REPEATING = ("sd15", "sdxl", "scale_shift")
SIZE = (8, 24)


class Block(nn.Module):
    """A residual block of eleven calls, once it is lowered."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(2, channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.norm(F.silu(self.first(F.silu(x))) * 2 + 1)))


def regions_of(graph: fx.Graph) -> Counter[str]:
    """How often each region is called."""
    return Counter(region.name for node in graph.nodes if (region := region_of(node)))


def lowered_without_regions(program: Any, graph: fx.Graph) -> fx.Graph:
    staged = stage(graph, [slot.name for slot in program.slots])
    cut_products.cut_products(staged)
    return staged


@cache
def call_of(name: str, kind: str, norm: str = "recorded") -> StepCall:
    return zoo_step_call(name, make_mask(kind, SIZE, seed=5), norm, padding=True)


def chain_call(count: int = 3, kind: str = "block", **layers: nn.Module) -> StepCall:
    """A call of blocks one after the other."""
    layers = layers or {f"block{number}": Block() for number in range(count)}

    def forward(module: Any, x: Tensor) -> Tensor:
        for name in layers:
            x = getattr(module, name)(x)
        return x

    compiled = compile_small(Forward(forward, **layers), dense_above=1.0)
    base, changed = record_run(compiled, example(compiled.original)), example(compiled.original, seed=1)
    mask = make_mask(kind, (12, 20))
    edit = {"sample": torch.where(mask, changed["sample"], base.inputs["sample"])}
    return step_call(compiled, base, edit, mask)


# -- which are found -------------------------------------------------------------------------------


def test_blocks_of_a_unet_become_few_regions_with_their_names() -> None:
    (program,) = compiled_model("scale_shift").programs
    called = regions_of(program.lowered("update"))
    assert called == {
        "down_blocks_0_resnets_0": 2,
        "down_blocks_1_attentions_0": 5,
        "down_blocks_2_resnets_0": 4,
        "up_blocks_0_resnets_0": 3,
        "up_blocks_1_resnets_0": 2,
        "up_blocks_2_resnets_1": 2,
    }
    calls = [node for node in program.lowered("update").nodes if region_of(node)]
    assert all(node.name.startswith(ir.path_of(node).replace(".", "_")) for node in calls)


@pytest.mark.parametrize("norm", NORMS)
def test_a_unet_of_the_size_of_stable_diffusion_has_few_regions(norm: Any) -> None:
    """Two resnets a level and three on the way up, as Stable Diffusion has them, in few channels."""
    from diffusers import UNet2DConditionModel

    attends = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32, 64, 64),
        down_block_types=attends,
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(attends)),
        attention_head_dim=8,
        cross_attention_dim=16,
        norm_num_groups=4,
    )
    (program,) = sparsify(unet.eval(), SparsifyConfig(cache=False, norm=norm)).programs
    called = regions_of(program.lowered("update"))
    attentions = {name: count for name, count in called.items() if "attentions" in name}
    assert attentions == {f"down_blocks_{level}_attentions_0": 5 for level in range(3)}
    assert len(called) == 8 and sum(called.values()) == 28


@pytest.mark.parametrize("name", REPEATING)
def test_blocks_begin_and_end_at_products(name: str) -> None:
    """So that what lies between two blocks is one kernel, as it is without blocks."""
    (program,) = compiled_model(name).programs
    regions = {region for node in program.lowered("update").nodes if (region := region_of(node))}
    assert regions
    for region in regions:
        calls = [node for node in region.graph.nodes if node.op == "call_function" and "expr" not in node.meta]
        assert is_product(calls[0]) and is_product(calls[-1])


def test_a_graph_without_repeats_stays_as_it_is() -> None:
    (program,) = compiled_model("plain_conv").programs
    graph = lowered_without_regions(program, program.update)
    assert outline_repeated(graph) is graph


def test_blocks_that_differ_in_a_number_or_a_size_are_not_one() -> None:
    class Other(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.second(F.silu(self.norm(F.silu(self.first(F.silu(x))) * 3 + 1)))

    class Wide(Block):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Conv2d(8, 16, 3, padding=1), nn.GroupNorm(2, 16)
            self.second = nn.Conv2d(16, 8, 3, padding=1)

    layers = {"a": Block(), "other": Other(), "wide": Wide(), "b": Block()}
    program = chain_call(**layers).executable.program
    calls = [node.name for node in program.lowered("update").nodes if region_of(node)]
    assert calls == ["a", "b"] and regions_of(program.lowered("update")) == {"a": 2}


def test_the_listing_shows_a_region_once_in_front_of_its_first_call() -> None:
    lines = listing(chain_call().executable.program.lowered("update"))
    (first,) = [number for number, line in enumerate(lines) if line == "# def block0:"]
    body = lines[first : next(number for number, line in enumerate(lines) if line.startswith("block0 = block0("))]
    assert any("fisedit.group_norm_sites(" in line for line in body)
    assert sum("fisedit.group_norm_sites(" in line for line in lines) == 1


# -- results ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REPEATING)
@pytest.mark.parametrize("graph", ["step", "update"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_step_gives_the_same_bits(name: str, graph: str, norm: str) -> None:
    for kind in ("site", "scattered", "full"):
        call = call_of(name, kind, norm)
        program = call.executable.program
        expected = call.run(lowered_without_regions(program, getattr(program, graph)))
        lowered = program.lowered(graph)  # type: ignore[arg-type]
        assert regions_of(lowered) and not regions_of(inlined(lowered))
        for made in (lowered, inlined(lowered)):
            assert all(map(torch.equal, call.run(made), expected)), kind


# -- compilation -----------------------------------------------------------------------------------


def arguments_of(call: StepCall, graph: fx.Graph) -> list[Any]:
    """As a pool of graphs gives them, with sizes that follow the mask marked so."""
    addresses = address_table(list(call.slots.values()), torch.device("cpu"))
    inputs = graph_inputs(graph)
    arguments = resolve(inputs, Sources(call.call, call.slots, call.hoisted, call.plan, addresses=addresses))
    for number, item in enumerate(inputs):
        is_table = isinstance(item, IotaInput) or (isinstance(item, TableInput) and item.table != "inverse")
        if is_table or isinstance(item, RingRowsInput):
            arguments[number] = arguments[number].clone()
            torch._dynamo.mark_dynamic(arguments[number], 1 if isinstance(item, RingRowsInput) else 0)
            if isinstance(item, TableInput) and item.table == "taps":
                torch._dynamo.mark_dynamic(arguments[number], 1)
    return arguments


@pytest.mark.parametrize("norm", NORMS)
def test_every_region_is_traced_once_for_every_mask(norm: str) -> None:
    traced: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, _: Any) -> Any:
        traced.append(graph)
        return graph

    program = call_of("sd15", "scattered", norm).executable.program
    lowered = program.lowered("update")
    step = call_of("sd15", "scattered", norm).executable._bind(lowered)
    allow_regions(lowered)
    compiled = torch.compile(step, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for kind in ("scattered", "block", "row"):
            call = call_of("sd15", kind, norm)
            results = compiled(*arguments_of(call, lowered))
            for actual, expected in zip(results, call.run(program.update), strict=True):
                assert_close(actual, expected, torch.float32)
    (graph,) = traced
    invoked = Counter(node.args[0].target for node in graph.graph.nodes if node.target is INVOKE)
    assert sorted(invoked.values()) == sorted(regions_of(lowered).values())


def test_a_call_of_another_layout_has_a_compilation_of_its_own() -> None:
    """A graph does not tell layouts, and code for one is wrong for another."""
    values = torch.randn(2, 9, 8)
    twice = fx.Graph()
    one, other = twice.placeholder("one"), twice.placeholder("other")
    doubled = fx.Graph()
    doubled.output((doubled.call_function(torch.ops.aten.mul.Tensor, (doubled.placeholder("x"), 2)),))
    target = Region("doubled", doubled).as_target()
    results = [twice.call_function(target, (value,)) for value in (one, other)]
    twice.output(tuple(twice.call_function(getitem, (result, 0)) for result in results))
    traced: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, _: Any) -> Any:
        traced.append(graph)
        return graph

    allow_regions(twice)
    compiled = torch.compile(fx.GraphModule({}, twice), fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    with torch.no_grad():
        found = compiled(values, values.transpose(0, 1).contiguous().transpose(0, 1))
    assert all(torch.equal(each, values * 2) for each in found)
    assert len({node.args[1] for node in traced[0].graph.nodes if node.target is INVOKE}) == 2


def test_regions_that_torch_refuses_are_compiled_with_all_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    call = chain_call()
    lowered = call.executable.program.lowered("update")
    compilations = []

    def refuse(step: fx.GraphModule, **_: Any) -> Any:
        compilations.append(regions_of(step.graph))

        def run(*arguments: Any) -> Any:
            if regions_of(step.graph):
                raise AssertionError("subgraph args must have consistent values!")
            return step(*arguments)

        return run

    monkeypatch.setattr(inductor.torch, "compile", refuse)
    monkeypatch.setattr(inductor, "directly", refuse_directly)
    compiled = compile_step(call.executable._bind(lowered))
    arguments = arguments_of(call, lowered)
    for _ in range(2):
        with torch.no_grad():
            results = compiled(*arguments)
        for actual, expected in zip(results, call.run(lowered), strict=True):
            assert torch.equal(actual, expected)
    assert compilations == [{"block0": 3}, {}]


def test_a_step_without_regions_is_handed_on_as_it_is() -> None:
    (program,) = compiled_model("plain_conv").programs
    step = fx.GraphModule(nn.Module(), fx.Graph())
    assert whole(step) is step and not regions_of(program.lowered("update"))
