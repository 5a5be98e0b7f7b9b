"""Staged steps: convolutions read gathered ring rows, attention reads by address, and the results are the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from fisedit_compiler.lowering.stage import stage
from tests.support.compiled_zoo import compiled_model, make_mask
from tests.support.pass_tools import identities, zoo_step_call

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
