"""Simplification removes what computes nothing and leaves one node per size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fisedit_compiler.capture.arguments import bind, sign
from fisedit_compiler.capture.captured import is_size_node
from fisedit_compiler.capture.export import capture
from fisedit_compiler.capture.known_models import known_model
from fisedit_compiler.passes.simplify import simplify
from tests.support.pass_tools import Forward, captured_graph, compile_small, counts, example
from tests.support.zoo import ZOO


def test_identities_vanish() -> None:
    module = Forward(
        lambda m, x: F.dropout(m.conv(x).to(x.dtype), 0.5, m.training).detach() / 1.0 * 1,
        conv=nn.Conv2d(8, 8, 3, padding=1),
    )
    captured = captured_graph(module)
    before = counts(captured.graph)
    simplify(captured)
    after = counts(captured.graph)
    assert sum(before.values()) > sum(after.values())
    assert after == {"aten.conv2d": 1}


def test_real_work_stays() -> None:
    module = Forward(lambda m, x: (m.conv(x) / 2.0).double(), conv=nn.Conv2d(8, 8, 1))
    captured = captured_graph(module)
    simplify(captured)
    after = counts(captured.graph)
    assert after["aten.div.Tensor"] == 1 and sum(n for name, n in after.items() if "to" in name) == 1


def test_sizes_keep_no_dense_value_alive() -> None:
    """A view that asks an intermediate value for its shape asks the input instead."""
    module = Forward(
        lambda m, x: m.conv(x).reshape(m.conv(x).shape[0], 8, -1).reshape(x.shape),
        conv=nn.Conv2d(8, 8, 3, padding=1, stride=1),
    )
    captured = captured_graph(module)
    simplify(captured)
    for node in captured.graph.nodes:
        if is_size_node(node):
            sources = [argument for argument in node.all_input_nodes if "expr" not in argument.meta]
            assert all(source is captured.spatial for source in sources), node
    assert counts(captured.graph)["aten.conv2d"] == 1, "the second one was computed for its shape alone"


def test_a_unet_loses_its_no_ops() -> None:
    model = ZOO["sd21"]()
    known = known_model(model.module)
    assert known is not None
    arguments = bind(model.module, (), model.make_inputs(), known.constants)
    arguments = known.canonical(arguments)
    signature, _ = sign(arguments, known.spatial)
    captured = capture(model.module, arguments, signature, 4)
    before = counts(captured.graph)
    assert before["aten.dropout"] > 0
    simplify(captured)
    after = counts(captured.graph)
    assert after["aten.dropout"] == 0 and after["aten._assert_tensor_metadata"] == 0
    for kept in ("aten.conv2d", "aten.group_norm", "aten.linear", "aten.scaled_dot_product_attention"):
        assert after[kept] == before[kept] > 0
    assert after["aten.sym_size.int"] <= 3, "batch, height and width of the latent"


def test_results_are_the_same_bits() -> None:
    module = Forward(lambda m, x: F.dropout(m.conv(x), 0.1, False) * 1.0, conv=nn.Conv2d(8, 8, 3, padding=1))
    compiled = compile_small(module)
    inputs = example(module)
    with compiled.record():
        assert torch.equal(compiled(**inputs), module(**inputs))


def test_dropout_that_is_meant_stays() -> None:
    captured = captured_graph(Forward(lambda m, x: F.dropout(m.conv(x), 0.5, True), conv=nn.Conv2d(8, 8, 1)))
    simplify(captured)
    assert counts(captured.graph)["aten.dropout"] == 1
