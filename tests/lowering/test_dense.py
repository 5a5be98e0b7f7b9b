"""The form of a recording graph that is compiled: the same results, fewer copies and readings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fisedit_compiler import SparsifyConfig, sparsify
from fisedit_compiler.graph.specs import ValueSpec, has_spec, spec_of
from fisedit_compiler.lowering.dense import DenseForm, dense_form, normalise, packed_weights
from fisedit_compiler.runtime.execution.executable import Executable
from tests.support.zoo import ZOO

aten, fisedit = torch.ops.aten, torch.ops.fisedit


Recorded = Callable[[str], tuple[fx.GraphModule, list[Any], dict[str, Tensor]]]


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    """Gives a model's recording graph, arguments for it, and packed weights by path."""
    return cache(_recorded)


def _recorded(name: str) -> tuple[fx.GraphModule, list[Any], dict[str, Tensor]]:
    seen: list[tuple[fx.GraphModule, list[Any], dict[str, Tensor]]] = []
    interpret = Executable.interpret

    def noting(self: Executable, tensors: Mapping[str, Tensor], **options: Any) -> Any:
        hoisted = self._hoisted(self.hoisted, tensors, {}, None, weights_only=True)
        packed = {path: hoisted[name] for path, name in packed_weights(self.program.bundles).items()}
        seen.append((self._graph("recording"), self._arguments(tensors), packed))
        return interpret(self, tensors, **options)

    model = ZOO[name]()
    compiled = sparsify(model.module, SparsifyConfig(norm="incremental", multiple=model.multiple, cache=False))
    with pytest.MonkeyPatch.context() as patched, torch.no_grad(), compiled.record():
        patched.setattr(Executable, "interpret", noting)
        compiled(**model.make_inputs(2, 16, 24, 0))
    return seen[-1]


@pytest.mark.parametrize("name", ["plain_conv", "sd15", "sdxl", "vae_decoder"])
def test_results_are_those_of_the_recording_graph(name: str, recorded: Recorded) -> None:
    graph, arguments, packed = recorded(name)
    before = str(graph.graph)
    form = dense_form(graph, packed)
    assert str(graph.graph) == before
    with torch.no_grad():
        expected = graph(*arguments)
        results = form.graph(*arguments, *(packed[path] for path in form.packed))
        found = form.finish(results)
        first = form.finish(results[:1])
    assert len(found) == len(expected) and len(first) == 1
    for value, right in zip([*found, *first], [*expected, expected[0]], strict=True):
        if isinstance(right, Tensor):
            # A convolution that reads its weight in channels_last writes its picture so as well.
            last = right.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)
            assert value.stride() == right.stride() or (last and right.is_contiguous())
            torch.testing.assert_close(value, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_no_canvas_is_copied_and_no_norm_reads_its_input_twice(name: str, recorded: Recorded) -> None:
    graph, *_ = recorded(name)
    form = dense_form(graph)
    targets = [node.target for node in form.graph.graph.nodes]
    results = graph.graph.output_node().args[0]
    canvases = [number for number, node in enumerate(results) if node.target is aten.flatten.using_ints]
    assert canvases and list(form.flattened) == canvases and aten.clone.default not in targets
    norms = [node for node in graph.graph.nodes if node.target is aten.group_norm.default]
    assert norms and aten.group_norm.default not in targets
    assert targets.count(normalise) == targets.count(fisedit.group_norm_statistics.default) == len(norms)


def weights_of(form: DenseForm) -> list[Any]:
    """Where the weights of convolutions over several sites come from."""
    return [
        node.args[1]
        for node in form.graph.graph.find_nodes(op="call_function", target=aten.conv2d.default)
        if spec_of(node.args[1] if has_spec(node.args[1]) else node).shape[2:] != (1, 1)
    ]


@pytest.mark.parametrize("name", ["sd15", "vae_decoder"])
def test_convolutions_read_packed_weights_where_they_are(name: str, recorded: Recorded) -> None:
    graph, arguments, packed = recorded(name)
    form = dense_form(graph, packed)
    assert set(form.packed) == set(packed)
    weights = weights_of(form)
    assert weights and all(weight.target is aten.permute.default for weight in weights)
    given = list(form.graph.graph.find_nodes(op="placeholder"))[len(arguments) :]
    assert [weight.args[0].args[0] for weight in weights] == given, "each is read once in these models"
    for path, value in packed.items():
        weight = graph.get_parameter(path)
        there = value.view(weight.shape[0], *weight.shape[2:], weight.shape[1]).permute(0, 3, 1, 2)
        assert torch.equal(there, weight) and there.is_contiguous(memory_format=torch.channels_last)
        assert there.data_ptr() == value.data_ptr()


def test_without_packed_weights_a_graph_has_its_own(recorded: Recorded) -> None:
    graph, *_ = recorded("sd15")
    form = dense_form(graph)
    assert form.packed == () and all(weight.op == "get_attr" for weight in weights_of(form))


def test_two_norms_of_one_input_share_what_is_recorded_of_it() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["spec"] = ValueSpec((), torch.float32)
    norms = [graph.call_function(aten.group_norm.default, (x, groups)) for groups in (4, 2, 4)]
    statistics = [graph.call_function(fisedit.group_norm_statistics.default, (x, groups)) for groups in (4, 2)]
    graph.output((*norms, *statistics))
    recording = fx.GraphModule({}, graph)
    form, value = dense_form(recording), torch.randn(2, 8, 4, 6)
    for found, expected in zip(form.finish(form.graph(value)), recording(value), strict=True):
        torch.testing.assert_close(found, expected)
    targets = [node.target for node in form.graph.graph.nodes]
    assert targets.count(normalise) == 3 and targets.count(fisedit.group_norm_statistics.default) == 2


def test_a_norm_of_float64_stays_one(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, *_ = recorded("sd15")
    for node in graph.graph.nodes:
        if has_spec(node):
            monkeypatch.setitem(node.meta, "spec", replace(spec_of(node), dtype=torch.float64))
    targets = [node.target for node in dense_form(graph).graph.graph.nodes]
    assert aten.group_norm.default in targets and normalise not in targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_norm_with_given_statistics_is_torchs_own(dtype: torch.dtype) -> None:
    x = torch.randn(2, 12, 5, 7).to(dtype) * 3 + 1
    weight, bias = torch.randn(12).to(dtype), torch.randn(12).to(dtype)
    statistics = fisedit.group_norm_statistics(x, 4)
    for given in ((weight, bias), (weight, None), (None, None)):
        expected = torch.nn.functional.group_norm(
            x.float(), 4, *(None if one is None else one.float() for one in given)
        )
        found = normalise(x, statistics, 4, *given, 1e-5)
        torch.testing.assert_close(found, expected.to(dtype))
