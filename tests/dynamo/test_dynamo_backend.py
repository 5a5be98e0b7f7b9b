"""``torch.compile(unet, backend="fisedit")``: the numbers of ``sparsify``, behind Dynamo's guards."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_map_only

from fisedit_compiler import SparsifyConfig, dynamo, sparsify
from fisedit_compiler.inspect.page.build import build_page
from fisedit_compiler.inspect.page.profile import profile_edit
from fisedit_compiler.kernels.tolerances import assert_close
from tests.support.compiled_zoo import (
    base_inputs,
    compiled_model,
    edit_inputs,
    edited,
    make_mask,
    output_of,
    record_run,
    zoo_model,
)
from tests.support.dynamo_models import MASK, NEVER_DENSE, SAMPLE, Convolved, Plain, compiled_by_dynamo
from tests.support.runs import together
from tests.support.zoo import ZOO


def on_cuda(value: Any) -> Any:
    return tree_map_only(Tensor, Tensor.cuda, value)


# -- results -------------------------------------------------------------------------------------


def test_torch_lists_it():
    assert "fisedit" in torch._dynamo.list_backends()


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
def test_an_edit_is_that_of_sparsify_at_every_size(dynamic: bool | None):
    """The first size is square, which Dynamo gives one symbol; the first call is made inside the mode."""
    compiled, reference = compiled_by_dynamo("sd15", dynamic), compiled_model("sd15")
    for batch, size in ((2, (16, 16)), (1, (20, 12))):
        mask = make_mask("block", size)
        inputs, changed = base_inputs("sd15", batch, size), edit_inputs("sd15", batch, size, mask)
        base = record_run(reference, inputs)
        expected, _ = edited(reference, base, changed, mask)

        with dynamo.record(compiled) as recording:
            recorded = output_of(compiled(**inputs))
        with dynamo.edit(compiled, recording, mask) as session:
            result = output_of(compiled(**changed))

        assert [kind for kind, _ in session.timings] == ["sparse"]
        assert torch.equal(recorded, base.output)
        assert torch.equal(result, expected)
        assert torch.equal(result[..., ~mask], recorded[..., ~mask])
        assert not torch.equal(result[..., mask], recorded[..., mask])


@pytest.mark.slow
def test_nested_arguments_find_their_places():
    size, mask = (8, 16), make_mask("block", (8, 16))
    compiled, reference = compiled_by_dynamo("sdxl"), compiled_model("sdxl")
    base = record_run(reference, base_inputs("sdxl", 2, size))
    changed = edit_inputs("sdxl", 2, size, mask)
    expected, _ = edited(reference, base, changed, mask)
    with dynamo.record(compiled) as recording:
        assert torch.equal(output_of(compiled(**base.inputs)), base.output)
    with dynamo.edit(compiled, recording, mask):
        assert torch.equal(output_of(compiled(**changed)), expected)


def test_in_no_mode_it_is_the_module_and_modes_compile_no_graph_again():
    compiled, inputs = compiled_by_dynamo("sd15"), base_inputs("sd15", 2, (8, 16))
    with torch.no_grad():
        expected = zoo_model("sd15").module(**inputs)[0]
        torch.testing.assert_close(compiled(**inputs)[0], expected)
        graphs = counters["stats"]["unique_graphs"]
        with dynamo.record(compiled) as recording:
            compiled(**inputs)
        with dynamo.edit(compiled, recording, make_mask("empty", (8, 16))):
            compiled(**inputs)
        torch.testing.assert_close(compiled(**inputs)[0], expected)
    assert counters["stats"]["unique_graphs"] == graphs


def test_timesteps_may_be_numbers_and_outputs_are_the_models_class():
    """Dynamo specialises on the first number and makes an input of it from the second on."""
    size, mask = (8, 16), make_mask("block", (8, 16))
    compiled, reference = compiled_by_dynamo("sd15"), compiled_model("sd15")

    def run(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
        inputs = {name: value for name, value in inputs.items() if name not in ("return_dict", "timestep")}
        return [model(timestep=timestep, **inputs).sample for timestep in (900, 481, 12)]

    inputs, changed = base_inputs("sd15", 2, size), edit_inputs("sd15", 2, size, mask)
    with reference.record() as recording:
        expected = run(reference, inputs)
    with dynamo.record(compiled) as through_dynamo:
        assert all(map(torch.equal, run(compiled, inputs), expected))
    assert [call.timestep for call in through_dynamo] == [900.0, 481.0, 12.0]
    with reference.edit(recording, mask):
        expected = run(reference, changed)
    with dynamo.edit(compiled, through_dynamo, mask):
        assert all(map(torch.equal, run(compiled, changed), expected))


def test_a_recording_opens_both_doors():
    size, mask = (8, 16), make_mask("block", (8, 16))
    compiled, reference = compiled_by_dynamo("sd15"), compiled_model("sd15")
    base = record_run(reference, base_inputs("sd15", 2, size))
    changed = edit_inputs("sd15", 2, size, mask)
    expected, _ = edited(reference, base, changed, mask)
    with dynamo.edit(compiled, base.recording, mask, record=True) as session:
        assert torch.equal(output_of(compiled(**changed)), expected)
    assert session.result is not None and session.result.complete
    with reference.edit(session.result, mask):
        torch.testing.assert_close(output_of(reference(**changed)), expected)


def test_options_are_the_fields_of_the_configuration():
    size, mask = (8, 16), make_mask("block", (8, 16))
    compiled, reference = compiled_by_dynamo("sd15", norm="incremental"), compiled_model("sd15", "incremental")
    base = record_run(reference, base_inputs("sd15", 2, size))
    changed = edit_inputs("sd15", 2, size, mask)
    expected, _ = edited(reference, base, changed, mask)
    with dynamo.record(compiled) as recording:
        compiled(**base.inputs)
    with dynamo.edit(compiled, recording, mask):
        assert torch.equal(output_of(compiled(**changed)), expected)
    assert dynamo.sparse_module(compiled).sparsify_config.norm == "incremental"
    assert len(dynamo.sparse_module(compiled).programs) == 1


def test_a_pipeline_takes_it():
    from tests.support.tiny_pipeline import make_tiny_pipeline

    pipe = make_tiny_pipeline()
    original = pipe.unet
    mask = make_mask("block", (16, 16))

    def run(prompt: str) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        latents: Tensor = pipe(prompt, num_inference_steps=3, generator=generator, output_type="latent").images
        return latents

    pipe.unet = reference = sparsify(original)
    with reference.record() as recording:
        expected_base = run("a cat")
    with reference.edit(recording, mask):
        expected = run("a dog")

    pipe.unet = torch.compile(original, backend="fisedit")
    with dynamo.record(pipe.unet) as recording:
        base = run("a cat")
    with dynamo.edit(pipe.unet, recording, mask):
        result = run("a dog")
    assert torch.equal(base, expected_base)
    assert torch.equal(result, expected)
    assert torch.equal(result[..., ~mask], base[..., ~mask])


@pytest.mark.gpu
def test_on_a_gpu_sparse_calls_are_lowered_and_all_of_inspection_works():
    """The options of the backend reach Inductor and CUDA graphs; check, explain and the page's time line see them."""
    module = ZOO["sd15"]().module.to("cuda", torch.float32)
    size, mask = (16, 24), make_mask("block", (16, 24))
    options = NEVER_DENSE | {"backend": "inductor"}
    # The function, not its name: a checkout that is not installed has no entry point.
    compiled: Any = torch.compile(module, backend=dynamo.fisedit, options=options)
    inputs = on_cuda(base_inputs("sd15", 2, size))
    changed = on_cuda(edit_inputs("sd15", 2, size, mask))
    reference = sparsify(module, SparsifyConfig(backend="eager", dense_above=1.0))
    base = record_run(reference, inputs)
    expected, _ = edited(reference, base, changed, mask)
    with dynamo.record(compiled) as recording:
        recorded = output_of(compiled(**inputs))
    with dynamo.edit(compiled, recording, mask) as session:
        result = output_of(compiled(**changed))
    assert [kind for kind, _ in session.timings] == ["sparse"]
    assert_close(result, expected, torch.float32)
    kept = ~mask.cuda()
    assert torch.equal(result[..., kept], recorded[..., kept])

    sparse = dynamo.sparse_module(compiled)
    (executable,) = sparse._programs.executables()
    assert executable._pools and executable._pools["update"]._graphs, "nothing was lowered"
    report = sparse.check(mask, lowered=True)
    assert report, str(report)
    assert "numbers are for 16x24 sites" in str(sparse.explain(mask)) and "on cuda" in str(sparse.explain(mask))
    events = profile_edit(sparse, mask)
    assert events and all(event.duration >= 0 for event in events), "kernels of one call"
    assert '<section id="time">' in build_page(sparse, mask, events=events)


# -- modules that the compiler does not know -----------------------------------------------------


@pytest.mark.parametrize("name", ["plain_conv", "vae_decoder"])
def test_any_module_is_compiled_at_its_first_recorded_call(name: str):
    compiled, reference = compiled_by_dynamo(name, multiple=zoo_model(name).multiple), compiled_model(name)
    mask = make_mask("block", (8, 16))
    base, changed = record_run(reference, base_inputs(name, 2, (8, 16))), edit_inputs(name, 2, (8, 16), mask)
    expected, _ = edited(reference, base, changed, mask)
    with dynamo.record(compiled) as recording:
        compiled(**base.inputs)
    with dynamo.edit(compiled, recording, mask):
        assert torch.equal(output_of(compiled(**changed)), expected)


@pytest.mark.parametrize("dynamic", [None, True])
def test_plain_values_are_those_of_the_call(dynamic: bool | None):
    module = Plain().eval()
    compiled: Any = torch.compile(module, backend="fisedit", dynamic=dynamic)
    for scale in (2.0, 3.0, 4.5, 2.0):
        with dynamo.record(compiled):
            torch.testing.assert_close(compiled(SAMPLE, scale), module(SAMPLE, scale))


def test_outputs_keep_their_structure():
    class Structured(Convolved):
        def forward(self, sample: Tensor) -> dict[str, Any]:
            first = self.conv(sample)
            return {"z": first * 2, "a": (first, self.conv(first))}

    module = Structured().eval()
    compiled: Any = torch.compile(module, backend="fisedit")
    with dynamo.record(compiled):
        torch.testing.assert_close(compiled(SAMPLE), module(SAMPLE))


def test_containers_of_torch_and_one_tensor_passed_twice():
    class Sum(Convolved):
        def forward(self, one: Tensor, other: Tensor, unread: Tensor | None = None) -> Tensor:
            return self.conv(one) + other

    chain = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.SiLU()).eval()
    for module, inputs in ((chain, (SAMPLE,)), (Sum().eval(), (SAMPLE, SAMPLE, torch.zeros(3)))):
        compiled: Any = torch.compile(module, backend="fisedit")
        with dynamo.record(compiled):
            torch.testing.assert_close(compiled(*inputs), module(*inputs))


def test_threads_are_in_modes_of_their_own():
    compiled: Any = torch.compile(Plain().eval(), backend="fisedit", options=NEVER_DENSE)

    def run(scale: float) -> list[Tensor]:
        sample = SAMPLE * scale
        with dynamo.record(compiled) as recording:
            outputs = [compiled(sample) for _ in range(2)]
        assert recording.num_calls == 2
        with dynamo.edit(compiled, recording, MASK):
            return [*outputs, *(compiled(torch.where(MASK, -sample, sample)) for _ in range(2))]

    def bystander() -> list[Tensor]:
        return [compiled(SAMPLE) for _ in range(4)]

    made = [partial(run, 1.0), bystander, partial(run, 2.0)]
    expected = [one() for one in made]
    for _ in range(2):
        for now, then in zip(together(made), expected, strict=True):
            assert all(map(torch.equal, now, then))
    assert not compiled._forward_hooks


def test_nothing_keeps_the_module_alive():
    module = Plain().eval()
    gone = weakref.ref(module)
    compiled: Any = torch.compile(module, backend="fisedit")
    with dynamo.record(compiled):
        compiled(SAMPLE)
    del module, compiled
    gc.collect()
    assert gone() is None
