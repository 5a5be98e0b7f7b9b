"""``explain()``: what became of every operation, rows, bytes and FLOPs, and plain words when nothing is known."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from fisedit_compiler import SparseModule, SparsifyConfig, sparsify
from fisedit_compiler.errors import MaskError, PlanError
from fisedit_compiler.geometry.block_costs import fits
from fisedit_compiler.geometry.site_plan import SitePlan
from fisedit_compiler.graph import ir
from fisedit_compiler.inspect.explain import explain_program, fates
from fisedit_compiler.inspect.explanation import Explanation
from fisedit_compiler.inspect.facts import OperationKernel, ProgramExplanation, Setting, Work
from fisedit_compiler.kernels.providers import ROUNDED
from tests.support.compiled import HEIGHT, WIDTH, box, model_and_compiled
from tests.support.pass_tools import Forward, compile_small

MASK = box(2, 2, 9, 9)


def only_program(explanation: Explanation) -> ProgramExplanation:
    (program,) = explanation.programs
    return program


def work_of(explanation: Explanation, name: str) -> Work:
    return next(work for work in only_program(explanation).work if work.name == name)


# -- operations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "sdxl", "vae_decoder", "pooled", "reflect"])
def test_every_captured_operation_is_counted_once(name: str) -> None:
    _, compiled = model_and_compiled(name)
    rows = only_program(compiled.explain()).operations
    for row in rows:
        assert row.captured == row.rewritten + row.hoisted + row.fused + row.kept + row.refused
    assert {row.operation: row.captured for row in rows} == compiled.programs[0].operations
    assert sum(row.share for row in rows) == pytest.approx(1.0)


def test_what_became_of_the_operations_of_a_unet() -> None:
    _, compiled = model_and_compiled()
    rows = {row.operation: row for row in only_program(compiled.explain()).operations}
    norm, upsample, linear = rows["aten.group_norm"], rows["aten.upsample_nearest2d.vec"], rows["aten.linear"]
    assert norm.rewritten == norm.captured and upsample.fused == upsample.captured
    # Of the three projections of every self-attention, the first one does the work of all.
    self_attentions = rows["aten.scaled_dot_product_attention"].captured // 2
    assert linear.fused == 2 * self_attentions
    text_and_time = linear.captured - linear.fused - linear.rewritten
    assert linear.hoisted == text_and_time > 2 * self_attentions
    assert rows["aten.sym_size.int"].kept == rows["aten.sym_size.int"].captured


def test_an_operation_is_hoisted_if_it_is_in_a_bundle_and_rewritten_if_it_is_in_the_step() -> None:
    _, compiled = model_and_compiled()
    (program,) = compiled.programs
    found = fates(program)
    in_step = {node.meta.get("origin") for node in program.step.nodes if node.op == "call_function"}
    in_bundles = {node.meta.get("origin") for b in program.bundles for node in b.graph.nodes}
    assert {name for name, fate in found.items() if fate == "rewritten"} <= in_step
    assert {name for name, fate in found.items() if fate == "hoisted"} <= in_bundles - in_step


def test_values_without_sites_that_depend_on_the_image_stay_as_they_are() -> None:
    module = Forward(lambda m, x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)))
    rows = {row.operation: row for row in only_program(compile_small(module).explain(size=(8, 8))).operations}
    assert rows["aten.sigmoid"].kept == 1 and rows["aten.mean.dim"].refused == 1 and rows["aten.mul.Tensor"].rewritten


def test_refusals_are_named_with_their_reason_their_place_and_their_share() -> None:
    _, compiled = model_and_compiled("reflect")
    explanation = compiled.explain()
    program = only_program(explanation)
    known = {(name, path, operation, reason) for name, path, operation, reason in compiled.programs[0].refusals}
    assert {(row.node, row.path, row.operation, row.reason) for row in program.refusals} == known
    assert all(row.reason in str(explanation) for row in program.refusals)
    convolution, pad = program.refusals
    assert (convolution.path, convolution.of, pad.of) == ("bordered", "FLOPs", "bytes")
    assert "self.bordered" in convolution.source
    # Of three 3x3 convolutions, 4 to 16, 16 to 16 and 16 to 4 channels.
    assert convolution.share == pytest.approx(16 * 16 / (4 * 16 + 16 * 16 + 16 * 4))
    assert 0.0 < pad.share < 1.0


def test_operations_without_a_formula_are_named() -> None:
    _, compiled = model_and_compiled("pooled")
    explanation = compiled.explain(MASK)
    assert work_of(explanation, "dense").cost.uncounted == ("aten.avg_pool2d", "aten.cumsum")
    assert "bytes only, for want of a formula: aten.avg_pool2d, aten.cumsum" in str(explanation)


# -- levels --------------------------------------------------------------------------------------


def test_a_mask_shows_rows_sizes_and_estimates_of_every_level() -> None:
    _, compiled = model_and_compiled()
    (executable,) = compiled._programs.executables()
    program = only_program(compiled.explain(MASK))
    assert program.area == 49 / (HEIGHT * WIDTH)
    assert [row.level for row in program.levels] == list(executable.plans.block_sizes.levels) == [1, 2, 4]
    assert [(row.active, row.sites) for row in program.levels] == [(49, 384), (16, 96), (9, 24)]
    for row in program.levels:
        assert row.estimates.keys() == fits("cpu").keys()
        assert row.estimates[row.block_size or 0] == min(row.estimates.values())
    text = str(compiled.explain(MASK))
    assert "0 operations stay dense" in text and "12.8% active sites, batch 2" in text and "on cpu" in text


def test_a_forced_size_is_shown() -> None:
    model, _ = model_and_compiled()
    forced = sparsify(model.module, SparsifyConfig(block_size=4, multiple=model.multiple))
    assert [row.block_size for row in only_program(forced.explain(MASK)).levels] == [4, 4, 4]


@pytest.mark.parametrize(
    "mask",
    [MASK.numpy(), MASK.float(), MASK[None], MASK.numpy().astype(np.uint8) * 255],
    ids=["numpy", "float", "[1, H, W]", "grey"],
)
def test_any_mask_of_the_size_of_the_latent(mask: Any) -> None:
    _, compiled = model_and_compiled()
    assert compiled.explain(mask) == compiled.explain(MASK)


def test_a_mask_of_the_size_of_the_image_needs_the_size_of_the_latent() -> None:
    _, compiled = model_and_compiled()
    pixels = MASK.repeat_interleave(8, 0).repeat_interleave(8, 1).numpy()
    picture = Image.fromarray(pixels.astype(np.uint8) * 255)
    assert compiled.explain(picture, size=(HEIGHT, WIDTH)) == compiled.explain(MASK)
    with pytest.raises(MaskError, match=r"pass it as size=\(height, width\)"):
        compiled.explain(picture)


def test_wrong_masks_and_sizes_are_refused() -> None:
    _, compiled = model_and_compiled()
    with pytest.raises(MaskError, match="bool, uint8 or float"):
        compiled.explain(torch.zeros(HEIGHT, WIDTH, dtype=torch.int64))
    with pytest.raises(MaskError, match=r"\[H, W\]"):
        compiled.explain(torch.zeros(WIDTH, dtype=torch.bool))
    with pytest.raises(PlanError, match="divisible by 4"):
        compiled.explain(size=(18, 24))
    with pytest.raises(PlanError, match="multiple of 4"):
        compiled.explain(torch.ones(18, 24, dtype=torch.bool))


# -- kernels -------------------------------------------------------------------------------------


def kernels_of(compiled: SparseModule, device: str, mask: torch.Tensor | None = None) -> dict[str, OperationKernel]:
    """What would compute the step on a device, by operation."""
    (executable,) = compiled._programs.executables()
    plan = None
    if mask is not None:
        plan = SitePlan.build(mask, executable.program.levels, executable.program.convs)
        plan = plan.blocked(dict.fromkeys(executable.plans.block_sizes.levels, 4))
    program = explain_program(executable, Setting(HEIGHT, WIDTH, 2, 7, 4, device), plan)
    assert len({row.operation for row in program.kernels}) == len(program.kernels)
    return {row.operation: row for row in program.kernels}


def test_on_a_cpu_references_run_and_kernels_say_what_they_are_for() -> None:
    _, compiled = model_and_compiled()
    explanation = compiled.explain(MASK)
    rows = {row.operation: row for row in only_program(explanation).kernels}
    step = compiled.programs[0].step
    called = {ir.target_name(node.target) for node in step.nodes if node.op == "call_function"}
    assert {name for name in called if name.startswith("fisedit.")} <= rows.keys()
    assert {row.runs for row in rows.values()} == {"reference"}
    attention = rows["fisedit.attention_sites"]
    assert attention.passed_over == {"triton": "it is for CUDA, calls run on cpu"}
    assert rows["fisedit.convolve"].calls == rows["fisedit.conv2d_sites"].calls > 0, "what a reference calls counts"
    assert "triton: it is for CUDA, calls run on cpu" in str(explanation) and "kernels of the step" in str(explanation)


@pytest.mark.parametrize("mask", [None, MASK], ids=["all sites", "mask"])
def test_on_a_gpu_float32_is_told_why_it_runs_no_tensor_cores(mask: torch.Tensor | None) -> None:
    model, _ = model_and_compiled()
    eager = sparsify(model.module, SparsifyConfig(multiple=model.multiple, backend="eager"))
    rows = kernels_of(eager, "cuda", mask)
    assert rows["fisedit.gather_taps"].runs == "triton"
    for name, runs in (("attention_sites", "reference"), ("cross_attention", "torch"), ("convolve", "reference")):
        assert rows[f"fisedit.{name}"].runs == runs
        assert rows[f"fisedit.{name}"].passed_over == {"triton": ROUNDED}


def test_what_inductor_takes_apart_is_said_to_be_its() -> None:
    _, compiled = model_and_compiled()
    rows = kernels_of(compiled, "cuda", MASK)
    found = {operation for operation, row in rows.items() if row.runs == "inductor"}
    taken_apart = ("conv2d_sites", "gather_sites", "group_norm_sites", "scatter_sites")
    assert found == {f"fisedit.{name}" for name in taken_apart}
    assert rows["fisedit.convolve"].calls == rows["fisedit.conv2d_sites"].calls


def test_a_kernel_comes_before_what_inductor_could_take_apart() -> None:
    _, compiled = model_and_compiled(norm="incremental")
    row = kernels_of(compiled, "cuda", MASK)["fisedit.update_statistics"]
    assert (row.runs, dict(row.passed_over)) == ("triton", {})


# -- bytes, FLOPs, times -------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"norm": "incremental"}], ids=["recorded", "incremental"])
def test_bytes_per_kind_of_slot_are_those_of_a_recording(options: dict[str, Any]) -> None:
    model, compiled = model_and_compiled(**options)
    with compiled.record() as recording:
        compiled(**model.make_inputs(2, HEIGHT, WIDTH))
    program = only_program(compiled.explain(size=(HEIGHT, WIDTH)))
    slots = compiled.programs[0].slots
    for row in program.slots:
        names = [slot.name for slot in slots if slot.kind.name == row.kind]
        assert row.slots == len(names)
        assert row.nbytes == sum(recording.slot(0, name).nbytes for name in names)
    assert program.recorded_bytes == recording.nbytes


def test_the_number_of_recorded_calls_gives_the_size_of_a_recording() -> None:
    module = Forward(lambda m, x: m.conv(x), conv=nn.Conv2d(8, 8, 3, padding=1))
    compiled = compile_small(module)
    assert "GiB in all" not in str(compiled.explain())
    with compiled.record() as recording:
        for _ in range(3):
            compiled(torch.zeros(2, 8, 12, 20))
    explanation = compiled.explain(size=(12, 20))
    assert only_program(explanation).setting.calls == 3
    assert only_program(explanation).recorded_bytes * 3 == recording.nbytes
    assert "recording, of 3 calls" in str(explanation) and "GiB in all" in str(explanation)


def test_costs_grow_with_the_mask_up_to_those_of_the_dense_call() -> None:
    model, _ = model_and_compiled()
    compiled = sparsify(model.module, SparsifyConfig(block_size=1, multiple=model.multiple))
    small, large, full = (compiled.explain(mask) for mask in (MASK, box(0, 0, 12, 16), box(0, 0, HEIGHT, WIDTH)))
    dense = work_of(full, "dense").flops or 0
    hoisted = sum(work.flops or 0 for work in only_program(full).work[2:])
    steps = [work_of(explanation, "step").flops or 0 for explanation in (small, large, full)]
    assert 0 < steps[0] < steps[1] < steps[2] == dense - hoisted
    assert work_of(small, "dense") == work_of(full, "dense")


def test_without_a_mask_the_step_stays_a_formula() -> None:
    _, compiled = model_and_compiled()
    explanation = compiled.explain(size=(HEIGHT, WIDTH))
    step = work_of(explanation, "step")
    assert step.flops is None and step.nbytes is None and only_program(explanation).levels == ()
    symbols = {str(symbol) for symbol in step.cost.flops.free_symbols}
    assert symbols == {"b", "h", "w", "t", *(f"{kind}_{level}" for kind in "nm" for level in (1, 2, 4))}
    assert f"FLOPs, step = {step.cost.flops}" in str(explanation)


def test_batch_and_tokens_are_taken_into_account() -> None:
    _, compiled = model_and_compiled()
    one, two, longer = (
        work_of(compiled.explain(MASK, **call), "step").flops or 0
        for call in ({"batch": 1}, {"batch": 2}, {"batch": 2, "tokens": 154})
    )
    assert two == 2 * one and longer > two


def test_without_a_size_the_configuration_of_the_model_gives_it() -> None:
    model, compiled = model_and_compiled()
    at = only_program(compiled.explain()).setting
    assert (at.height, at.width) == (model.module.config["sample_size"],) * 2
    _, decoder = model_and_compiled("vae_decoder")
    at = only_program(decoder.explain()).setting
    assert (at.height, at.width) == (8, 8)


def test_measured_times_stand_beside_the_costs_of_the_same_call() -> None:
    model, shared = model_and_compiled()
    compiled = sparsify(model.module, shared.sparsify_config)
    inputs = model.make_inputs(2, HEIGHT, WIDTH)
    assert compiled.explain(MASK).measured == ()
    with compiled.record() as recording:
        for _ in range(3):
            compiled(**inputs)
    with compiled.edit(recording) as session:
        compiled(**{**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"] + 1})
        session.set_mask(MASK)
        compiled(**inputs)
        compiled(**inputs)
    explanation = compiled.explain(MASK)
    dense, sparse = explanation.measured
    assert (dense.kind, dense.calls, sparse.kind, sparse.calls) == ("dense", 1, "sparse", 2)
    seconds = sorted(took for kind, took in session.timings if kind == "sparse")
    assert sparse.seconds == pytest.approx(sum(seconds) / 2)
    assert work_of(explanation, "dense").measured == dense and work_of(explanation, "step").measured == sparse
    assert "calls timed last" in str(explanation)
    for other in (compiled.explain(box(0, 0, 4, 4)), compiled.explain(MASK, batch=1)):
        assert work_of(other, "step").measured is None and other.measured == explanation.measured


# -- forms ---------------------------------------------------------------------------------------


def test_the_dictionary_is_json() -> None:
    _, compiled = model_and_compiled("reflect")
    explanation = compiled.explain(MASK)
    told = json.loads(json.dumps(explanation.to_dict()))
    (program,) = told["programs"]
    assert program["setting"]["height"] == HEIGHT and program["recorded_bytes"] > 0
    assert {row["operation"] for row in program["refusals"]} == {"aten.conv2d", "aten.pad"}
    assert program["levels"][0]["level"] == "1" and program["levels"][0]["active"] == 49
    step = next(work for work in program["work"] if work["name"] == "step")
    assert step["cost"]["flops"] == str(work_of(explanation, "step").cost.flops) and step["flops"] > 0


def test_rich_and_notebooks_show_the_same_tables() -> None:
    _, compiled = model_and_compiled("pooled")
    explanation = compiled.explain(MASK)
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(explanation)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    titles = ("operations", "operations that stay dense", "levels", "recording", "cost")
    assert all(title in printed and title in str(explanation) for title in titles)
    html = explanation._repr_html_()
    assert html.startswith("<pre") and "aten.cumsum" in html
    assert "\x1b" not in str(explanation)


def test_nothing_compiled() -> None:
    explanation = sparsify(nn.Conv2d(3, 3, 1).eval()).explain()
    assert str(explanation).startswith("nothing is compiled yet: record a call, or pass example_inputs to sparsify")


def test_a_mask_that_will_not_run_sparsely_is_said_to() -> None:
    model, compiled = model_and_compiled()
    dense = sparsify(model.module, SparsifyConfig(dense_above=0.0, multiple=model.multiple))
    assert "calls run densely" in dense.explain(MASK).note
    assert "empty" in compiled.explain(box(0, 0, 0, 0)).note
    assert work_of(compiled.explain(box(0, 0, 0, 0)), "step").flops == 0
    assert compiled.explain(MASK).note == ""


def test_a_session_explains_what_it_runs() -> None:
    model, compiled = model_and_compiled()
    inputs = model.make_inputs(2, HEIGHT, WIDTH)
    with compiled.record() as recording:
        compiled(**inputs)
    with compiled.edit(recording) as session:
        assert str(session.explain()) == "no mask is set: calls run densely"
        session.set_mask(MASK)
        assert "no call was made with it yet" in str(session.explain())
        compiled(**inputs)
        during = only_program(session.explain())
    after = only_program(compiled.explain(MASK))
    assert during == after
    assert "12.8% active sites" in str(session.explain())
    with compiled.edit(recording, box(0, 0, 0, 0)) as session:
        assert "empty" in str(session.explain())
        compiled(**inputs)
    dense = sparsify(model.module, SparsifyConfig(dense_above=0.0, multiple=model.multiple))
    with dense.edit(recording, MASK) as session:
        assert str(session.explain()) == session.fallback
        dense(**inputs)
