"""The verifier finds planted defects and names the pass and the node; refusals come with reasons in words."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy
import torch
from torch import fx, nn

from fisedit_compiler.errors import VerificationError
from fisedit_compiler.graph import ir
from fisedit_compiler.graph.specs import ValueSpec, spec_of
from fisedit_compiler.passes.base import Program, Rewriter
from fisedit_compiler.passes.rewrites.convolution import Convolution
from fisedit_compiler.passes.rewrites.outputs import Outputs
from fisedit_compiler.passes.rewriting import record_refusals
from fisedit_compiler.passes.verify import verify, verify_complete
from tests.support.compiled_zoo import compiled_model
from tests.support.pass_tools import CHANNELS, Forward, working_program
from tests.support.zoo import UNETS

aten = torch.ops.aten


def rewritten() -> Program:
    """A convolution on rows, its output unpacked for a dense activation behind it."""
    module = Forward(lambda m, x: torch.tanh(m.conv(x)), conv=nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1))
    program = working_program(module)
    Convolution().run(program)
    verify(program, "convolution")
    return program


def only(program: Program, target: object) -> fx.Node:
    (node,) = ir.nodes_calling(program.graph, [target])
    return node


def wrong_spec(node: fx.Node) -> None:
    spec = spec_of(node)
    node.meta["spec"] = ValueSpec((*spec.shape[:-1], spec.shape[-1] + 1), spec.dtype)


def pack_without_sites(program: Program) -> str:
    weight = next(node for node in program.graph.nodes if node.op == "get_attr")
    only(program, ir.pack).args = (weight,)
    return "packs a value without sites"


def pack_of_unpack(program: Program) -> str:
    only(program, ir.unpack).meta["layout"] = only(program, aten.tanh.default).meta["layout"]
    unpack = only(program, ir.unpack)
    with program.graph.inserting_after(unpack):
        ir.call(program.graph, ir.pack, (unpack,), spec=spec_of(only(program, ir.pack)))
    return "packs what was just unpacked"


def pack_of_another_shape(program: Program) -> str:
    wrong_spec(only(program, ir.pack))
    return "is due"


def unpack_of_other_rows(program: Program) -> str:
    wrong_spec(only(program, torch.ops.fisedit.conv2d_sites.default))
    return "is due"


def unpack_on_another_base(program: Program) -> str:
    base = only(program, ir.unpack).args[1]
    assert isinstance(base, fx.Node)
    wrong_spec(base)
    return "is due"


def unpack_on_no_base(program: Program) -> str:
    unpack = only(program, ir.unpack)
    unpack.args = (unpack.args[0], None)
    return "needs rows and a base value"


def load_of_an_unknown_slot(program: Program) -> str:
    load = ir.nodes_calling(program.graph, [ir.load])[0]
    load.args = ("nowhere.input",)
    return "which nothing stores"


def slot_without_origin(program: Program) -> str:
    load = ir.nodes_calling(program.graph, [ir.load])[0]
    slot = program.slots[str(load.args[0])]
    object.__setattr__(slot, "origin", "vanished")
    return "comes from vanished"


def canvas_of_another_shape(program: Program) -> str:
    load = next(n for n in ir.nodes_calling(program.graph, [ir.load]) if program.slots[n.args[0]].kind.name == "canvas")
    wrong_spec(load)
    return "which stores"


def value_without_a_spec(program: Program) -> str:
    del only(program, aten.tanh.default).meta["spec"]
    return "has no spec"


def write_into_an_argument(program: Program) -> str:
    only(program, aten.tanh.default).target = aten.tanh_.default
    return "mutates an argument"


DEFECTS: list[Callable[[Program], str]] = [
    pack_without_sites,
    pack_of_unpack,
    pack_of_another_shape,
    unpack_of_other_rows,
    unpack_on_another_base,
    unpack_on_no_base,
    load_of_an_unknown_slot,
    slot_without_origin,
    canvas_of_another_shape,
    value_without_a_spec,
    write_into_an_argument,
]


@pytest.mark.parametrize("plant", DEFECTS, ids=lambda plant: plant.__name__)
def test_a_planted_defect_is_found(plant: Callable[[Program], str]) -> None:
    program = rewritten()
    problem = plant(program)
    with pytest.raises(VerificationError, match=problem) as caught:
        verify(program, "planted")
    message = str(caught.value)
    assert "After pass planted: " in message and "disabled_passes={'planted'}" in message
    assert any(node.name in message for node in program.graph.nodes), "names the node"


def test_a_graph_out_of_order_is_found() -> None:
    program = rewritten()
    tanh = only(program, aten.tanh.default)
    tanh.args[0].append(tanh)  # type: ignore[union-attr]
    only(program, ir.pack).prepend(tanh)
    with pytest.raises(VerificationError, match=r"After pass planted.*malformed.*tanh"):
        verify(program, "planted")


def test_a_dense_operation_without_a_reason_is_found() -> None:
    program = rewritten()
    Outputs().run(program)
    with pytest.raises(VerificationError, match=r"aten\.tanh.*dense without a recorded reason"):
        verify_complete(program)
    record_refusals(program)
    verify_complete(program)
    assert program.refusals == {"tanh": "no rule for aten.tanh"}


def test_one_slot_with_two_shapes_is_found() -> None:
    program = rewritten()
    record_refusals(program)
    load = ir.nodes_calling(program.graph, [ir.load])[0]
    with program.graph.inserting_before(only(program, ir.unpack)):
        spec = ValueSpec((sympy.Integer(1),), torch.float32)
        ir.call(program.graph, ir.load, load.args, spec=spec)
    with pytest.raises(VerificationError, match=f"loads slot {load.args[0]}"):
        verify_complete(program)


def test_rows_of_what_was_unpacked_are_the_rows() -> None:
    """``pack(unpack(rows, base))`` is never written."""
    program = rewritten()
    unpack = only(program, ir.unpack)
    assert Rewriter(program).rows(unpack) is unpack.args[0]


@pytest.mark.parametrize("name", UNETS)
def test_unets_have_nothing_dense(name: str) -> None:
    program = compiled_model(name).programs[0]
    assert program.refusals == ()
    made = [report.name for report in program.reports]
    assert made[made.index("outputs") :][:6] == ["outputs", "lower", "recording", "stores", "update", "step"]
    assert all(report.seconds >= 0 for report in program.reports)


@pytest.mark.parametrize(
    ("name", "operations"), [("pooled", {"aten.avg_pool2d", "aten.cumsum"}), ("reflect", {"aten.pad", "aten.conv2d"})]
)
def test_refusals_say_what_where_and_why(name: str, operations: set[str]) -> None:
    program = compiled_model(name).programs[0]
    assert {operation for _, _, operation, _ in program.refusals} <= operations | {"aten.reflection_pad2d"}
    for node, path, operation, reason in program.refusals:
        assert node and operation.startswith("aten.") and len(reason.split()) >= 3
        assert path in dict(compiled_model(name).original.named_modules())


def test_a_disabled_pass_is_the_reason() -> None:
    program = compiled_model("sd21", "recorded", "active", disabled=frozenset({"convolution"})).programs[0]
    assert {reason for *_, reason in program.refusals} >= {"pass convolution is disabled"}
