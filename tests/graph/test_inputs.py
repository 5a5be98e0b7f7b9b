"""What placeholders stand for: every kind resolves in one place, and no graph of a program says it in another way."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx

from fisedit_compiler.graph import inputs
from fisedit_compiler.graph.inputs import (
    AddressedInput,
    AddressInput,
    BatchInput,
    CallInput,
    ColumnsInput,
    HeldInput,
    HoistedInput,
    Input,
    IotaInput,
    RingRowsInput,
    SlotInput,
    Sources,
    TableInput,
    graph_inputs,
    key_of,
    resolve,
    slot_of,
)
from fisedit_compiler.graph.listing import code_of
from fisedit_compiler.lowering.stage import stage
from fisedit_compiler.passes import Instruments
from fisedit_compiler.passes.programs.maps import map_graphs
from tests.support.compiled_zoo import compiled_model

CANVAS = torch.arange(12.0).reshape(1, 4, 3)
SOURCES = Sources(
    call={"sample": "the sample"},
    slots={"conv.input": CANVAS},
    hoisted={"key": "the key"},
    plan=SimpleNamespace(active={Fraction(2): "the table"}, ring={"geometry": torch.tensor([3, 1])}),
    batch=7,
    columns=torch.tensor([[0]]),
    addresses=torch.tensor([5]),
    held={"up": "the rows"},
)
KINDS: list[tuple[Input, Any, str]] = [
    (CallInput("sample"), "the sample", "call, sample"),
    (BatchInput(), 7, "batch"),
    (SlotInput("conv.input"), CANVAS, "slot, conv.input"),
    (HoistedInput("key"), "the key", "hoisted, key"),
    (TableInput("active", Fraction(2)), "the table", "table, active, 2"),
    (ColumnsInput(), SOURCES.columns, "columns"),
    (RingRowsInput("conv.input", "geometry"), CANVAS[:, [3, 1]], "ring_rows, conv.input, geometry"),
    (IotaInput("geometry"), torch.tensor([0, 1]), "iota, geometry"),
    (AddressedInput("conv.input"), CANVAS, "addressed, conv.input"),
    (AddressInput(), SOURCES.addresses, "addresses"),
    (HeldInput("up", 1), "the rows", "held, up, 1"),
]


def test_the_table_above_has_every_kind() -> None:
    classes = {item for item in vars(inputs).values() if isinstance(item, type) and issubclass(item, Input)}
    assert {type(item) for item, *_ in KINDS} == classes - {Input}
    assert len({item.kind for item, *_ in KINDS}) == len(KINDS)


@pytest.mark.parametrize(("item", "value", "text"), KINDS, ids=lambda part: getattr(part, "kind", ""))
def test_each_resolves_and_is_written(item: Input, value: Any, text: str) -> None:
    graph = fx.Graph()
    node = inputs.placeholder(graph, "anything", item)
    assert graph_inputs(graph) == (item,)
    (found,) = resolve(graph_inputs(graph), SOURCES)
    assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value
    assert code_of(node) == f"anything = input({text})"


def test_a_captured_graph_is_called_with_the_tensors_of_the_call() -> None:
    graph = fx.Graph()
    node = graph.placeholder("sample")
    assert graph_inputs(graph) == (CallInput("sample"),)
    assert inputs.input_of(node) is None and slot_of(node) == "" == slot_of(3)
    with pytest.raises(TypeError, match="sample is no index table"):
        key_of(node)


def test_every_placeholder_of_a_program_says_what_it_stands_for() -> None:
    (program,) = compiled_model("sd15").programs
    maps = map_graphs(program.captured, program.recording, Instruments())
    graphs = [
        program.step,
        program.update,
        maps.reuse,
        maps.reuse_recording,
        stage(program.update, [slot.name for slot in program.slots]),
    ]
    for graph in (*graphs, *(bundle.graph for bundle in program.bundles)):
        found = [node.meta["input"] for node in graph.nodes if node.op == "placeholder"]
        assert all(isinstance(item, Input) for item in found)
        assert len(set(found)) == len(found), "each is an argument once"
