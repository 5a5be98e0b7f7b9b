"""What a recording stores: exactly what sparse operations load, each value once."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import fx

from fisedit_compiler.graph import ir
from fisedit_compiler.graph.inputs import slot_of
from fisedit_compiler.kernels.tolerances import max_error
from fisedit_compiler.lowering.program import CompiledProgram
from fisedit_compiler.slots.canvas import Canvas
from fisedit_compiler.slots.site_sums import SiteSums
from fisedit_compiler.slots.statistics import Statistics
from tests.support.compiled_zoo import (
    SEMANTICS,
    Attention,
    Norm,
    base_run,
    compiled_model,
    edit_inputs,
    make_mask,
    record_run,
)
from tests.support.zoo import UNETS, ZOO


def program_of(name: str, norm: Norm = "recorded", attention: Attention = "cached") -> CompiledProgram:
    return compiled_model(name, norm, attention).programs[0]


def loaded(graph: fx.Graph) -> list[str]:
    return [slot_of(node) for node in graph.nodes if slot_of(node) and node.users]


@pytest.mark.parametrize(("norm", "attention"), SEMANTICS)
@pytest.mark.parametrize("name", ZOO)
def test_each_load_has_one_store_and_each_store_a_load(name: str, norm: Norm, attention: Attention) -> None:
    program = program_of(name, norm, attention)
    stored = [slot.name for slot in program.slots]
    assert Counter(loaded(program.step)) == Counter(stored), "no slot that no operation of the step loads"
    assert len({(slot.origin, slot.kind) for slot in program.slots}) == len(stored)
    assert all(slot.name and not slot.name.startswith(".") for slot in program.slots)
    output = next(node for node in program.recording.nodes if node.op == "output")
    assert len(output.args[0]) == len(program.outputs) + len(stored)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", UNETS)
def test_kinds_follow_the_semantics(name: str) -> None:
    def kinds(norm: Norm, attention: Attention) -> Counter[str]:
        return Counter(slot.kind.name for slot in program_of(name, norm, attention).slots)

    def keys(norm: Norm, attention: Attention) -> int:
        names = [slot.name for slot in program_of(name, norm, attention).slots]
        return sum(slot.endswith((".key", ".value")) for slot in names)

    assert kinds("recorded", "cached")["site_sums"] == 0
    assert kinds("incremental", "cached")["site_sums"] == kinds("incremental", "cached")["statistics"] > 0
    assert keys("recorded", "active") == keys("incremental", "active") == 0
    calls = program_of(name).operations["aten.scaled_dot_product_attention"] // 2
    assert keys("recorded", "cached") == 2 * calls > 0, "keys and values of every self-attention, of no other"
    assert kinds("recorded", "cached")["dense"] == 1, "the output, and no dense island"


@pytest.mark.parametrize(("norm", "attention"), SEMANTICS)
@pytest.mark.parametrize("name", ["sd15", "vae_decoder", "pooled"])
def test_a_recording_holds_its_slots_and_nothing_else(name: str, norm: Norm, attention: Attention) -> None:
    recording = base_run(name, norm, attention, 2, (8, 24)).recording
    (call,) = recording.calls
    program = program_of(name, norm, attention)
    assert list(call.slots) == [slot.name for slot in program.slots]
    assert recording.bytes_per_call == [sum(t.numel() * t.element_size() for t in call.slots.values())]
    assert recording.nbytes == sum(recording.bytes_per_call)
    for tensor in call.slots.values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, "a slot keeps no larger tensor alive"


@pytest.mark.parametrize("name", ZOO)
def test_shapes_of_slots(name: str) -> None:
    """A canvas is channels last over all sites of its level; statistics and sums are per group."""
    batch, (height, width) = 2, (8, 24)
    recording = base_run(name, "incremental", "cached", batch, (height, width)).recording
    for slot in program_of(name, "incremental").slots:
        tensor, level = recording.slot(0, slot.name), slot.layout.level
        assert tensor.shape[0] == batch and level is not None
        sites = int(height / level) * int(width / level)
        if isinstance(slot.kind, Canvas):
            assert tensor.shape[slot.layout.site_dim()] == sites
        elif isinstance(slot.kind, Statistics):
            assert tensor.shape == (batch, slot.kind.groups, 2) and tensor.dtype is torch.float32
        elif isinstance(slot.kind, SiteSums):
            assert tensor.shape == (batch, sites, slot.kind.groups, 2)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "vae_decoder", "plain_conv"])
def test_an_edit_of_every_site_records_what_a_base_run_would(name: str) -> None:
    """With exact statistics each slot after a full edit is the slot of a dense recording of the edited inputs."""
    batch, size = 2, (8, 24)
    compiled, base = compiled_model(name, "incremental"), base_run(name, "incremental", "cached", batch, size)
    mask = make_mask("full", size)
    inputs = edit_inputs(name, batch, size, mask)
    with compiled.edit(base.recording, mask, record=True) as session:
        compiled(**inputs)
    assert session.result is not None
    fresh = record_run(compiled, inputs).recording
    for slot in program_of(name, "incremental").slots:
        error = max_error(session.result.slot(0, slot.name), fresh.slot(0, slot.name))
        assert error <= 1e-4, f"{slot.name}: {error}"


@pytest.mark.parametrize("name", ["sd15", "pooled", "vae_decoder"])
def test_an_edit_records_what_it_did_not_change_as_it_was(name: str) -> None:
    """Inactive sites of every canvas and map keep the base run's bits, and the base recording keeps all of its own."""
    batch, size = 2, (8, 24)
    compiled, base = compiled_model(name, "incremental"), base_run(name, "incremental", "cached", batch, size)
    before = {key: tensor.clone() for key, tensor in base.recording.calls[0].slots.items()}
    mask = make_mask("block", size, seed=1)
    with compiled.edit(base.recording, mask, record=True) as session:
        compiled(**edit_inputs(name, batch, size, mask))
    plan, result = session.plan, session.result
    assert plan is not None and result is not None
    for slot in program_of(name, "incremental").slots:
        old, new, level = before[slot.name], result.slot(0, slot.name), slot.layout.level
        assert torch.equal(base.recording.slot(0, slot.name), old), f"{slot.name} of the base was written to"
        assert level is not None
        kept = ~plan.active_mask(level)
        if slot.kind.name == "canvas":
            dim, sites = slot.layout.site_dim(), kept.flatten().nonzero().flatten()
            assert torch.equal(new.index_select(dim, sites), old.index_select(dim, sites)), slot.name
        elif slot.kind.name == "dense" and slot.layout.axes == (2, 3):
            assert torch.equal(new[..., kept], old[..., kept]), slot.name


@pytest.mark.parametrize("name", UNETS)
def test_slots_are_named_after_their_place_in_the_model(name: str) -> None:
    modules = dict(compiled_model(name).original.named_modules())
    for slot in program_of(name).slots:
        path = slot.name.rpartition(".")[0]
        assert slot.name.startswith("output") or path in modules or path.rpartition(".")[0] in modules, slot.name


@pytest.mark.parametrize(("norm", "attention"), SEMANTICS)
@pytest.mark.parametrize("name", ZOO)
def test_no_marker_is_left(name: str, norm: Norm, attention: Attention) -> None:
    program = program_of(name, norm, attention)
    for graph in (program.recording, program.step, program.update, *(bundle.graph for bundle in program.bundles)):
        assert not ir.nodes_calling(graph, ir.MARKERS)
        graph.lint()
