"""What does not depend on the picture is computed once: per weights, per prompt, per timestep."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from fisedit_compiler import SparseModule, SparsifyConfig, sparsify
from fisedit_compiler.errors import RecordingError
from fisedit_compiler.graph.inputs import BatchInput, CallInput, HoistedInput, SlotInput, TableInput, input_of
from fisedit_compiler.kernels.tolerances import assert_close
from fisedit_compiler.passes.programs.hoist import BATCH_SIZE
from fisedit_compiler.runtime.execution.hoisting import HoistCache
from tests.reference.pinned import PinnedRun
from tests.support.compiled_zoo import Size, base_inputs, compiled_model, edit_inputs, make_mask, output_of, zoo_model
from tests.support.zoo import UNETS, ZOO

SIZE: Size = (8, 24)
TIMESTEPS = (900, 500, 100)
TEXT, TIME = "encoder_hidden_states", "timestep"


@pytest.fixture
def fresh() -> SparseModule:
    """A compilation of its own (the capture is cached), with its own weights to write to."""
    return sparsify(copy.deepcopy(zoo_model("sd15").module), SparsifyConfig())


def cache_of(compiled: SparseModule) -> HoistCache:
    (executable,) = compiled._programs._executables.values()
    return executable.hoisted


def run(compiled: SparseModule, inputs: dict[str, Any]) -> torch.Tensor:
    """One denoising run of a few steps."""
    outputs = [output_of(compiled(**{**inputs, TIME: torch.tensor(step)})) for step in TIMESTEPS]
    return torch.stack(outputs)


def new_computations(compiled: SparseModule, before: Counter[str]) -> dict[str, int]:
    return dict(Counter(cache_of(compiled).computed) - before)


def of_text(computations: dict[str, int]) -> bool:
    """Whether everything that depends on the text was computed once, and nothing else was."""
    return TEXT in computations and all(TEXT in name and count == 1 for name, count in computations.items())


def computed(compiled: SparseModule) -> Counter[str]:
    return Counter(cache_of(compiled).computed)


def recorded(compiled: SparseModule, batch: int = 2) -> tuple[dict[str, Any], Any]:
    inputs = base_inputs("sd15", batch, SIZE)
    with compiled.record() as recording:
        run(compiled, inputs)
    return inputs, recording


def edit(compiled: SparseModule, recording: Any, inputs: dict[str, Any], mask: str = "block") -> torch.Tensor:
    with compiled.edit(recording, make_mask(mask, SIZE)):
        return run(compiled, inputs)


@pytest.mark.parametrize("name", ZOO)
def test_the_step_computes_nothing_that_depends_on_text_time_or_weights_alone(name: str) -> None:
    program = compiled_model(name).programs[0]
    for graph in (program.step, program.update):
        for node in graph.nodes:
            if node.op == "placeholder":
                item = input_of(node)
                of_call = isinstance(item, CallInput)
                spatial = of_call and item.name in program.spatial
                node.meta["moves"] = spatial or isinstance(item, SlotInput | TableInput)
                if of_call and not spatial:
                    assert not node.users, f"{node.name} is read by the step itself"
            elif node.op == "get_attr":
                node.meta["moves"] = False
            elif node.op == "call_function":
                node.meta["moves"] = any(argument.meta["moves"] for argument in node.all_input_nodes)
                assert node.meta["moves"], f"{node.format_node()} could be hoisted"


@pytest.mark.parametrize("name", UNETS)
def test_bundles_depend_on_what_they_say(name: str) -> None:
    program = compiled_model(name).programs[0]
    by_name = {bundle.name: bundle for bundle in program.bundles}
    assert {"weights", TEXT} <= set(by_name)
    assert any(TIME in bundle.dependences for bundle in program.bundles)
    assert not by_name["weights"].dependences and by_name[TEXT].dependences == {TEXT}
    known: set[str] = set()
    for bundle in program.bundles:
        for item in bundle.inputs:
            if isinstance(item, HoistedInput):
                assert item.value in known, "bundles come in an order in which they can be computed"
            elif isinstance(item, CallInput):
                assert item.name in bundle.dependences
            else:
                assert isinstance(item, BatchInput) and BATCH_SIZE in bundle.dependences
        known |= set(bundle.values)


def test_once_per_prompt_and_once_per_call(fresh: SparseModule) -> None:
    _, recording = recorded(fresh)
    assert not computed(fresh), "a recording run hoists nothing"
    prompt = edit_inputs("sd15", 2, SIZE, make_mask("block", SIZE))
    edit(fresh, recording, prompt)
    first = computed(fresh)
    assert first["weights"] == first[TEXT] == 1
    timed = {name: count for name, count in first.items() if TIME in name}
    assert timed and set(timed.values()) == {len(TIMESTEPS)}


def test_the_next_edit_of_a_recording_reuses_time_and_a_new_prompt_is_computed(fresh: SparseModule) -> None:
    inputs, recording = recorded(fresh)
    first = edit_inputs("sd15", 2, SIZE, make_mask("block", SIZE))
    edit(fresh, recording, first)
    before = computed(fresh)
    edit(fresh, recording, {**inputs, TEXT: first[TEXT].clone()})
    assert new_computations(fresh, before) == {}, "an equal prompt is the same prompt"
    edit(fresh, recording, {**inputs, TEXT: first[TEXT] + 1})
    assert of_text(new_computations(fresh, before))
    edit(fresh, recording, first)
    assert of_text(new_computations(fresh, before)), "the last two prompts are kept"


def test_a_prompt_written_over_in_place_is_a_new_prompt(fresh: SparseModule) -> None:
    inputs, recording = recorded(fresh)
    text = inputs[TEXT].clone()
    edit(fresh, recording, {**inputs, TEXT: text})
    before = computed(fresh)
    text.mul_(2)
    changed = edit(fresh, recording, {**inputs, TEXT: text})
    assert of_text(new_computations(fresh, before))
    assert torch.equal(
        changed, edit(compiled_model("sd15"), recorded(compiled_model("sd15"))[1], {**inputs, TEXT: text})
    )


def test_another_guidance_batch_is_computed_again(fresh: SparseModule) -> None:
    inputs, recording = recorded(fresh, batch=2)
    edit(fresh, recording, inputs)
    before = computed(fresh)
    alone, single = recorded(fresh, batch=1)
    edit(fresh, single, alone)
    again = new_computations(fresh, before)
    assert again[TEXT] == 1 and "weights" not in again
    timed = {name: count for name, count in again.items() if TIME in name}
    assert all(BATCH_SIZE in name and count == len(TIMESTEPS) for name, count in timed.items()), timed


def assert_follows(compiled: SparseModule, recording: Any, inputs: dict[str, Any]) -> None:
    """The edit's first call equals the oracle on the module as it is now."""
    mask = make_mask("block", SIZE)
    prompt = {**edit_inputs("sd15", 2, SIZE, mask), TIME: torch.tensor(TIMESTEPS[0])}
    base = {**inputs, TIME: torch.tensor(TIMESTEPS[0])}
    with compiled.edit(recording, mask) as session:
        packed = run(compiled, prompt)[0]
    plan = session.plan
    assert plan is not None
    active = {plan.size(level): plan.active_mask(level) for level in plan.active}
    assert_close(packed, PinnedRun(compiled.original, base).replay(prompt, active), torch.float32)


def cross_attention(compiled: SparseModule) -> nn.Module:
    return compiled.original.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2")


def write_through_data(compiled: SparseModule) -> None:
    cross_attention(compiled).to_k.weight.data.mul_(1.5)


def replace_a_parameter(compiled: SparseModule) -> None:
    linear = cross_attention(compiled).to_v
    linear.weight = nn.Parameter(linear.weight.detach() + 0.1, requires_grad=False)


def change_a_scale(compiled: SparseModule) -> None:
    cross_attention(compiled).rescale_output_factor = 2.0


def write_a_convolution(compiled: SparseModule) -> None:
    compiled.original.get_submodule("conv_in").weight.data.add_(0.05)


CHANGES = [write_through_data, replace_a_parameter, change_a_scale, write_a_convolution]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_model_refuses_old_recordings_and_forgets_hoisted_values(change: Any) -> None:
    compiled = sparsify(copy.deepcopy(zoo_model("sd15").module), SparsifyConfig())
    inputs, recording = recorded(compiled)
    assert_follows(compiled, recording, inputs)
    change(compiled)
    with pytest.raises(RecordingError, match="another model: the structure or the weights differ"):
        edit(compiled, recording, inputs)
    inputs, again = recorded(compiled)
    assert_follows(compiled, again, inputs)


def test_bundles_are_bounded() -> None:
    """Prompts beyond the last few are forgotten; so are calls beyond the limit."""
    compiled = compiled_model("sd15")
    (executable,) = list(compiled._programs._executables.values())[:1]
    cache = HoistCache(frozenset({TIME}), calls=3, prompts=2)
    inputs = compiled._programs.bind((), base_inputs("sd15", 2, SIZE))[0].tensors
    for step in range(6):
        tensors = {**inputs, TIME: torch.tensor(float(step)), TEXT: inputs[TEXT] + step}
        cache.evaluate(executable._bundle_modules(), tensors, 2)
    sizes = {name: sum(map(len, kept.values())) for name, kept in cache._kept.items()}
    assert sizes["weights"] == 1 and sizes[TEXT] == 2
    assert all(size == 3 for name, size in sizes.items() if TIME in name)
    held = cache.nbytes
    cache.clear()
    assert held > 0 and cache.nbytes == 0
