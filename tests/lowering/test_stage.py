"""Staged steps: convolutions read gathered ring rows, attention reads by address, and the results are the same bits."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import fx

from fisedit_compiler.graph.inputs import (
    AddressedInput,
    AddressInput,
    CallInput,
    IotaInput,
    RingRowsInput,
    SlotInput,
    TableInput,
    graph_inputs,
    input_of,
    key_of,
    placeholder,
    slot_of,
)
from fisedit_compiler.lowering.stage import stage
from tests.support.compiled_zoo import base_run, compiled_model, edit_inputs, make_mask
from tests.support.pass_tools import step_call, zoo_step_call

CONVOLUTION = torch.ops.fisedit.conv2d_sites.default
ADDRESSED = torch.ops.fisedit.attention_addressed.default
ATTENTION = torch.ops.fisedit.attention_sites.default
UPDATE = torch.ops.fisedit.update_statistics.default
ROW_SUMS = torch.ops.fisedit.group_norm_row_sums.default
UPDATE_ADDRESSED = torch.ops.fisedit.update_statistics_addressed.default
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


@pytest.mark.parametrize("name", ["sd15", "scale_shift", "vae_decoder"])
@pytest.mark.parametrize("padding", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("recorded", [False, True])
def test_a_norm_reads_its_rows_once_and_site_sums_by_address(name: str, padding: bool, recorded: bool) -> None:
    for kind in ("site", "scattered", "full"):
        mask = make_mask(kind, SIZE, seed=5)
        base, inputs = base_run(name, "incremental", "cached", 2, SIZE), edit_inputs(name, 2, SIZE, mask)
        call = step_call(compiled_model(name, "incremental"), base, inputs, mask, padding=padding)
        program = call.executable.program
        step = program.update if recorded else program.step
        staged = stage(step, call.executable.slot_names)
        before, after = (Counter(node.target for node in graph.nodes) for graph in (step, staged))
        assert after[UPDATE_ADDRESSED] == before[UPDATE] > 0
        assert before[ROW_SUMS] == before[UPDATE] * recorded
        assert after[UPDATE] == after[ROW_SUMS] == 0
        for node in staged.nodes:
            if node.target is UPDATE_ADDRESSED:
                sums = input_of(node.args[2])
                assert isinstance(sums, AddressedInput) and input_of(node.args[4]) == AddressInput()
                assert call.executable.slot_names[node.args[5]] == sums.slot
                assert node.args[6] is recorded
        assert not [item for item in graph_inputs(staged) if isinstance(item, SlotInput) and "sums" in item.slot]
        for plain, there in zip(call.run(step), call.run(staged), strict=True):
            assert torch.equal(there, plain), kind


def test_only_sums_of_the_same_rows_about_the_same_mean_are_kept_on_the_way() -> None:
    graph = fx.Graph()
    items = {"rows": CallInput("rows"), "other": CallInput("other"), "mean": SlotInput("mean")}
    items |= {"sums": SlotInput("sums"), "active": TableInput("active", 1)}
    rows, other, mean, sums, active = (placeholder(graph, name, item) for name, item in items.items())
    updates = [graph.call_function(UPDATE, (x, mean, sums, active)) for x in (rows, other)]
    kept = [graph.call_function(ROW_SUMS, (x, about)) for x, about in ((rows, mean), (other, updates[0]))]
    graph.output((*updates, *kept))
    staged = stage(graph, ["mean", "sums"])
    assert [node.args[5:] for node in staged.nodes if node.target is UPDATE_ADDRESSED] == [(1, True), (1, False)]
    assert sum(node.target is ROW_SUMS for node in staged.nodes) == 1
