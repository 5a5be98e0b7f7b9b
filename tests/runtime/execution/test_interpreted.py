"""A bound graph as a function of its inputs: what it computes, and whose weights it reads."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import fx, nn

from fisedit_compiler import SparsifyConfig, sparsify
from fisedit_compiler.runtime.execution.interpreted import interpreted
from tests.support.zoo import ZOO


def bound(*names: str) -> fx.GraphModule:
    """``x * a.0.weight + a.0.weight``, the weight looked up twice; ``names`` are those of the look-ups."""
    inner = nn.Module()
    inner.weight = nn.Parameter(torch.arange(3.0))
    graph = fx.Graph()
    x = graph.placeholder("x")
    first, second = (graph.create_node("get_attr", "a.0.weight", name=name) for name in names)
    product = graph.call_function(operator.mul, (x, first))
    graph.output((graph.call_function(operator.add, (product, second)), x))
    return fx.GraphModule({"a.0.weight": inner.weight}, graph)


@pytest.mark.parametrize("names", [("weight", "again"), ("x", "x_")])
def test_it_computes_what_the_graph_does_with_a_weight_once(names):
    graph_module = bound(*names)
    before = str(graph_module.graph)
    x = torch.randn(3)
    total, same = interpreted(graph_module)(x)
    assert torch.equal(total, graph_module(x)[0]) and same is x
    assert str(graph_module.graph) == before, "the bound graph is left as it is"


def test_a_graph_without_weights_or_inputs():
    graph = fx.Graph()
    graph.output(graph.call_function(operator.add, (1, 2)))
    assert interpreted(fx.GraphModule({}, graph))() == 3


def test_a_step_follows_a_weight_that_was_exchanged():
    """The function is made anew with the graph: it would keep the old weight alive and read it."""
    zoo = ZOO["sd15"]()
    inputs = zoo.make_inputs()
    mask = torch.zeros(inputs["sample"].shape[-2:], dtype=torch.bool)
    mask[4:8, 4:8] = True
    edited = zoo.edit_inputs(inputs, mask)

    def edit(compiled: Any) -> torch.Tensor:
        with compiled.record() as recording:
            compiled(**inputs)
        with compiled.edit(recording, mask=mask):
            return compiled(**edited)[0]

    config = SparsifyConfig(dense_above=1.0)
    compiled = sparsify(zoo.module, config)
    before = edit(compiled)
    zoo.module.conv_in.weight = nn.Parameter(2 * zoo.module.conv_in.weight.detach())
    after = edit(compiled)
    assert not torch.equal(after, before) and torch.equal(after, edit(sparsify(zoo.module, config)))
