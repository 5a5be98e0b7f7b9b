"""Staged steps: convolutions read gathered ring rows, attention reads by address, and the results are the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiled_zoo import base_run, compiled_model, edit_inputs, edited, make_mask
from torch import Tensor, fx

from fisedit_compiler.kernels.addresses import address_table
from fisedit_compiler.passes.stage import stage
from fisedit_compiler.runtime.cuda_graphs import bucket
from fisedit_compiler.runtime.site_plan import SitePlan

CONVOLUTION = torch.ops.fisedit.conv2d_sites.default
ADDRESSED = torch.ops.fisedit.attention_addressed.default
ATTENTION = torch.ops.fisedit.attention_sites.default
NAMES = ("sd15", "sdxl", "scale_shift", "plain_conv", "vae_decoder")
SIZE = (8, 24)


def identities(graph: fx.Graph) -> list[tuple[Any, ...]]:
    return [node.meta["input"] for node in graph.nodes if node.op == "placeholder"]


def step_of(name: str) -> fx.Graph:
    (program,) = compiled_model(name).programs
    return program.step


def slots_of(name: str) -> list[str]:
    (program,) = compiled_model(name).programs
    return [slot.name for slot in program.slots]


def value_of(
    identity: tuple[Any, ...], given: dict[str, dict[str, Tensor]], plan: SitePlan, slots: dict[str, Tensor]
) -> Tensor:
    kind, *rest = identity
    if kind == "ring_rows":
        return slots[rest[0]].index_select(1, plan.ring[rest[1]])
    if kind == "addressed":
        return slots[rest[0]]
    if kind == "addresses":
        return address_table(list(slots.values()), torch.device("cpu"))
    if kind == "iota":
        return torch.arange(plan.ring[rest[0]].shape[0])
    if kind in given:
        return given[kind][rest[0]]
    table: Tensor = getattr(plan, rest[0])[rest[1]]
    return table


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("padding", [False, True], ids=["plain", "padded"])
def test_results_are_the_same_bits(name: str, padding: bool) -> None:
    compiled, base = compiled_model(name), base_run(name, "recorded", "cached", 2, SIZE)
    for kind in ("site", "scattered", "block", "full"):
        mask = make_mask(kind, SIZE, seed=5)
        inputs = edit_inputs(name, 2, SIZE, mask)
        _, session = edited(compiled, base, inputs, mask)
        plan = session.plan
        assert plan is not None
        if padding:
            rows = {level: bucket(table.shape[0]) for level, table in plan.active.items()}
            plan = plan.padded(rows, {key: bucket(table.shape[0]) for key, table in plan.ring.items()})
        call, _ = compiled._programs.bind((), inputs)
        slots = dict(base.recording.calls[0].slots)
        executable = call.executable
        bundles = executable._bundle_modules()
        given = {
            "call": dict(call.tensors),
            "slot": slots,
            "hoisted": executable.hoisted.evaluate(bundles, call.tensors, 2),
        }
        results = []
        for graph in (executable.program.step, stage(executable.program.step, executable.slot_names)):
            arguments = [value_of(identity, given, plan, slots) for identity in identities(graph)]
            with torch.no_grad():
                results.append(executable._bind(graph)(*arguments))
        for plain, staged in zip(*results, strict=True):
            assert torch.equal(staged, plain), kind


@pytest.mark.parametrize("name", NAMES)
def test_no_convolution_reads_a_recorded_canvas(name: str) -> None:
    step = step_of(name)
    before = identities(step)
    graph = stage(step, slots_of(name))
    assert identities(step) == before, "the graph that was given stays as it is"
    convolutions = [node for node in graph.nodes if node.target is CONVOLUTION]
    assert len(convolutions) == sum(node.target is CONVOLUTION for node in step.nodes) > 0
    for node in convolutions:
        kind, _slot, key = node.args[1].meta["input"]
        assert kind == "ring_rows"
        assert node.args[2].meta["input"] == ("iota", key)
        assert node.args[3].meta["input"][-1] == key, "taps and ring are of the same geometry"
    after = identities(graph)
    assert len(set(after)) == len(after), "what two convolutions read is staged once"
    canvases = {identity[1] for identity in after if identity[0] == "slot"}
    others = {
        node.meta["input"][1]
        for node in step.nodes
        if node.op == "placeholder"
        and node.meta["input"][0] == "slot"
        and any(user.target not in (CONVOLUTION, ATTENTION) for user in node.users)
    }
    attentions = [node for node in graph.nodes if node.target is ADDRESSED]
    assert len(attentions) == sum(node.target is ATTENTION for node in step.nodes)
    for node in attentions:
        names = [canvas.meta["input"][1] for canvas in node.args[3:5]]
        assert [slots_of(name)[entry] for entry in node.args[8:10]] == names, "entries name the canvases"
        assert node.args[7].meta["input"] == ("addresses",)
    assert canvases == others, "canvases that only convolutions and attention read are not brought along"
    assert all(node.users for node in graph.nodes if node.op == "placeholder")
    graph.lint()
