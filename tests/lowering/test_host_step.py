"""Steps as a CPU runs them: what is changed, and that they compute what the steps do."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fisedit_compiler import SparsifyConfig, sparsify
from fisedit_compiler.graph.inputs import Sources, graph_inputs, resolve
from fisedit_compiler.kernels.registry import NAMESPACE
from fisedit_compiler.kernels.tolerances import assert_close
from fisedit_compiler.lowering.host import products, step
from fisedit_compiler.lowering.host.named import with_names
from fisedit_compiler.lowering.host.norms import scale_and_shift
from fisedit_compiler.lowering.host.products import convolution, pack_weight, product
from fisedit_compiler.lowering.host.step import host_step
from tests.reference.pinned import PinnedRun
from tests.support.compiled_zoo import active_sets, base_inputs, edit_inputs, edited, make_mask, record_run, zoo_model
from tests.support.pass_tools import StepCall, zoo_step_call

LINEAR = torch.ops.aten.linear.default
CONVOLUTION = torch.ops.fisedit.conv2d_sites.default
NORM = torch.ops.fisedit.group_norm_sites.default
SIZE = (16, 24)
NAMES = ("sd15", "sdxl", "scale_shift")

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture
def all_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The zoo's layers are too small to be packed, and the machine may be one that nobody measured."""
    monkeypatch.setattr(step, "is_worth_it", lambda: True)
    monkeypatch.setattr(products, "_FEW_OUTPUTS", 1)
    monkeypatch.setattr(products, "_MANY_INPUTS", 1)


@pytest.fixture
def nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "is_worth_it", lambda: False)


def targets(graph: fx.Graph) -> Counter[Any]:
    return Counter(node.target for node in graph.nodes if node.op == "call_function")


def on_host(call: StepCall) -> tuple[fx.Graph, list[Tensor]]:
    """The step of a call as a CPU runs it, and what that returns."""
    executable = call.executable
    graph = executable.program.step
    attributes = {str(node.target): executable._resolve(node.target) for node in graph.nodes if node.op == "get_attr"}
    weights = {name for bundle in executable.program.bundles if not bundle.dependences for name in bundle.values}
    made, recipes = host_step(graph, attributes, call.hoisted, weights)
    inputs = graph_inputs(made)
    sources = Sources(call.call, call.slots, call.hoisted, call.plan)
    arguments = resolve(inputs[: len(inputs) - len(recipes)], sources)
    prepared = [recipe.made(attributes, call.hoisted) for recipe in recipes]
    with torch.no_grad():
        return made, list(executable._bind(made)(*arguments, *prepared))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("nothing_is_packed")
def test_folded_norms_and_direct_calls_give_the_same_bits(name: str) -> None:
    call = zoo_step_call(name, make_mask("block", SIZE, seed=1))
    before = targets(call.executable.program.step)
    graph, results = on_host(call)
    after = targets(graph)
    assert before[NORM] > 1 and after[scale_and_shift] == before[NORM]
    assert not any(map(is_own, graph.nodes)), "references are called directly"
    assert all(map(torch.equal, results, call.run(call.executable.program.step)))


@pytest.mark.usefixtures("nothing_is_packed")
def test_norms_whose_statistics_are_corrected_in_the_step_stay() -> None:
    call = zoo_step_call("sd15", make_mask("block", SIZE, seed=1), norm="incremental")
    graph, results = on_host(call)
    assert targets(graph)[scale_and_shift] == 0
    assert all(map(torch.equal, results, call.run(call.executable.program.step)))


class _OfTwoBatches(nn.Module):
    """Norms before and after its samples are repeated, or some are dropped."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change
        self.before, self.between = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(groups, 8) for groups in (2, 4, 2, 4))
        self.after = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        hidden = self.before(sample)
        hidden = self.between(self.norms[0](hidden) + self.norms[1](hidden))
        hidden = self.change(hidden)
        return self.after(self.norms[2](hidden) + self.norms[3](hidden))


@pytest.mark.parametrize(
    "change",
    [
        lambda hidden: torch.cat([hidden, hidden]),
        lambda hidden: hidden[:1],
        lambda hidden: hidden.repeat_interleave(2, 0),
    ],
)
def test_norms_of_other_batches_are_folded_apart(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    compiled = sparsify(_OfTwoBatches(change).eval(), SparsifyConfig(dense_above=1.0))
    sample, mask = torch.randn(2, 4, *SIZE), make_mask("block", SIZE, seed=1)
    others = torch.tensor(3.0), torch.randn(2, 5, 8)
    changed = torch.where(mask, sample + 1, sample)
    outputs = []
    for folded in (True, False):
        if not folded:
            monkeypatch.setattr(step, "fold_norms", lambda preparation: None)
            compiled = sparsify(compiled.original, SparsifyConfig(dense_above=1.0))
        with torch.no_grad():
            with compiled.record() as base:
                compiled(sample, *others)
            with compiled.edit(base, mask=mask):
                outputs.append(compiled(changed, *others))
    assert torch.equal(*outputs)


@needs_onednn
@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("all_is_packed")
def test_packed_products_compute_the_same(name: str, block_size: int) -> None:
    call = zoo_step_call(name, make_mask("block", SIZE, seed=1), block_size=block_size)
    before = targets(call.executable.program.step)
    graph, results = on_host(call)
    after = targets(graph)
    assert before[CONVOLUTION] and after[convolution] == before[CONVOLUTION]
    assert before[LINEAR] and after[product] == before[LINEAR]
    for result, due in zip(results, call.run(call.executable.program.step), strict=True):
        assert_close(result, due, torch.float32)


@needs_onednn
@pytest.mark.usefixtures("all_is_packed")
def test_no_more_is_packed_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    call = zoo_step_call("sd15", make_mask("block", SIZE, seed=1))
    graph, _ = on_host(call)
    every = targets(graph)[product] + targets(graph)[convolution]
    monkeypatch.setattr(products, "MOST_BYTES", 4096)
    graph, results = on_host(call)
    assert 0 < targets(graph)[product] + targets(graph)[convolution] < every
    for result, due in zip(results, call.run(call.executable.program.step), strict=True):
        assert_close(result, due, torch.float32)


@needs_onednn
def test_a_rows_bits_depend_on_no_other_row() -> None:
    weight = torch.randn(64, 576)
    packed, rows = pack_weight(weight), torch.randn(2, 9, 576)
    together = product(rows, packed, None)
    assert torch.equal(together, product(rows, packed, None))
    assert all(torch.equal(product(part, packed, None), due) for part, due in zip(rows, together, strict=True))
    assert product(rows[:, :0], packed, None).shape == (2, 0, 64)


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("all_is_packed")
def test_other_dtypes_are_not_packed(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(weight: Tensor) -> Tensor:
        raise AssertionError(f"a weight of {weight.dtype} is packed")

    monkeypatch.setattr(products, "pack_weight", refuse)
    inputs = base_inputs("sd15", 2, SIZE, dtype)
    mask = make_mask("block", SIZE, seed=1)
    compiled = sparsify(zoo_model("sd15", dtype).module, SparsifyConfig(dense_above=1.0))
    base = record_run(compiled, inputs)
    output, _ = edited(compiled, base, edit_inputs("sd15", 2, SIZE, mask, dtype), mask)
    assert torch.equal(output[..., ~mask], base.output[..., ~mask])


@needs_onednn
@pytest.mark.usefixtures("all_is_packed")
def test_what_was_packed_of_earlier_weights_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """By graphs that are not called again, too."""
    packed: list[weakref.ref[Tensor]] = []

    def noted(weight: Tensor) -> Tensor:
        value = pack_weight(weight)
        packed.append(weakref.ref(value))
        return value

    monkeypatch.setattr(products, "pack_weight", noted)
    module = copy.deepcopy(zoo_model("sd15").module)
    compiled = sparsify(module, SparsifyConfig(dense_above=1.0))
    inputs, mask = base_inputs("sd15", 2, SIZE), make_mask("block", SIZE, seed=1)
    changed = edit_inputs("sd15", 2, SIZE, mask)
    base = record_run(compiled, inputs)
    with compiled.edit(base.recording, mask=mask, record=True):
        compiled(**changed)
    edited(compiled, base, changed, mask)
    before = len(packed)
    with torch.no_grad():
        module.conv_in.weight.mul_(1.5)
    edited(compiled, record_run(compiled, inputs), changed, mask)
    gc.collect()
    assert [value() is None for value in packed] == [True] * before + [False] * (len(packed) - before)


@needs_onednn
@pytest.mark.usefixtures("all_is_packed")
def test_edits_equal_the_oracle_and_follow_weights_that_are_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside the mask they are the recording; those that record and those that do not share what is packed."""
    packed: list[Tensor] = []
    monkeypatch.setattr(products, "pack_weight", lambda weight: packed.append(weight) or pack_weight(weight))
    module = copy.deepcopy(zoo_model("sd15").module)
    compiled = sparsify(module, SparsifyConfig(dense_above=1.0))
    inputs, mask = base_inputs("sd15", 2, SIZE), make_mask("block", SIZE, seed=1)
    changed = edit_inputs("sd15", 2, SIZE, mask)
    for _ in range(2):
        base = record_run(compiled, inputs)
        packed.clear()
        output, session = edited(compiled, base, changed, mask)
        count = len(packed)
        assert count > 20
        assert_close(output, PinnedRun(module, inputs).replay(changed, active_sets(session)), torch.float32)
        assert torch.equal(output[..., ~mask], base.output[..., ~mask])
        assert torch.equal(edited(compiled, base, changed, mask)[0], output)
        with compiled.edit(base.recording, mask, record=True):
            assert torch.equal(compiled(**changed)[0], output)
        assert len(packed) == count, "packed once a set of weights"
        with torch.no_grad():
            module.conv_in.weight.mul_(1.5)
            module.mid_block.attentions[0].proj_in.weight.mul_(0.5)


@pytest.mark.usefixtures("nothing_is_packed")
def test_profilers_see_operations_by_their_names() -> None:
    """Names and results are those of the step as it was; without a profiler no call is wrapped."""
    call = zoo_step_call("sd15", make_mask("block", SIZE, seed=1))
    graph, _ = on_host(call)
    before = {node.target._schema.name for node in call.executable.program.step.nodes if is_own(node)}
    named = {node.target.__wrapped__: node.meta["operation"] for node in with_names(graph).nodes if is_wrapped(node)}
    assert before == set(named.values()) and not any(is_wrapped(node) for node in graph.nodes)
    assert named[scale_and_shift] == "fisedit::group_norm_sites"


def is_own(node: fx.Node) -> bool:
    return getattr(node.target, "namespace", "") == NAMESPACE


def is_wrapped(node: fx.Node) -> bool:
    return hasattr(node.target, "__wrapped__")
