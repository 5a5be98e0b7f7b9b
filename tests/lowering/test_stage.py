"""Staged steps: convolutions read gathered ring rows, attention reads by address, and the results are the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from fisedit_compiler.graph.inputs import (
    AddressInput,
    IotaInput,
    RingRowsInput,
    SlotInput,
    graph_inputs,
    input_of,
    key_of,
    slot_of,
)
from fisedit_compiler.lowering.stage import stage
from tests.support.compiled_zoo import compiled_model, make_mask
from tests.support.pass_tools import zoo_step_call

CONVOLUTION = torch.ops.fisedit.conv2d_sites.default
ADDRESSED = torch.ops.fisedit.attention_addressed.default
ATTENTION = torch.ops.fisedit.attention_sites.default
NAMES = ("sd15", "sdxl", "scale_shift", "plain_conv", "vae_decoder")
SIZE = (8, 24)


def step_of(name: str) -> fx.Graph:
    (program,) = compiled_model(name).programs
    return program.step


def slots_of(name: str) -> list[str]:
    (program,) = compiled_model(name).programs
    return [slot.name for slot in program.slots]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("padding", [False, True], ids=["plain", "padded"])
def test_results_are_the_same_bits(name: str, padding: bool) -> None:
    for kind in ("site", "scattered", "block", "full"):
        call = zoo_step_call(name, make_mask(kind, SIZE, seed=5), padding=padding)
        step = call.executable.program.step
        results = (call.run(step), call.run(stage(step, call.executable.slot_names)))
        for plain, staged in zip(*results, strict=True):
            assert torch.equal(staged, plain), kind


@pytest.mark.parametrize("name", NAMES)
def test_no_convolution_reads_a_recorded_canvas(name: str) -> None:
    step = step_of(name)
    before = graph_inputs(step)
    graph = stage(step, slots_of(name))
    assert graph_inputs(step) == before, "the graph that was given stays as it is"
    convolutions = [node for node in graph.nodes if node.target is CONVOLUTION]
    assert len(convolutions) == sum(node.target is CONVOLUTION for node in step.nodes) > 0
    for node in convolutions:
        ring = input_of(node.args[1])
        assert isinstance(ring, RingRowsInput)
        assert input_of(node.args[2]) == IotaInput(ring.key)
        assert key_of(node.args[3]) == ring.key, "taps and ring are of the same geometry"
    after = graph_inputs(graph)
    assert len(set(after)) == len(after), "what two convolutions read is staged once"
    canvases = {item.slot for item in after if isinstance(item, SlotInput)}
    others = {
        slot_of(node)
        for node in step.nodes
        if slot_of(node) and any(user.target not in (CONVOLUTION, ATTENTION) for user in node.users)
    }
    attentions = [node for node in graph.nodes if node.target is ADDRESSED]
    assert len(attentions) == sum(node.target is ATTENTION for node in step.nodes)
    for node in attentions:
        names = [input_of(canvas).slot for canvas in node.args[3:5]]
        assert [slots_of(name)[entry] for entry in node.args[8:10]] == names, "entries name the canvases"
        assert input_of(node.args[7]) == AddressInput()
    assert canvases == others, "canvases that only convolutions and attention read are not brought along"
    assert all(node.users for node in graph.nodes if node.op == "placeholder")
    graph.lint()
