"""``compiled.check(mask)``: right programs pass, and a bug planted anywhere is found and named."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from planted import PLANTS, THIRD, Plant, rule, third_on_rows, unet, with_dense_end
from torch import Tensor, fx

from fisedit_compiler import Recording, SparseModule, SparsifyConfig, sparsify
from fisedit_compiler.errors import ConfigError, MaskError, ModeError, RecordingError
from fisedit_compiler.geometry import site_plan
from fisedit_compiler.inspect.check import CheckReport
from fisedit_compiler.inspect.pinned import PinnedInterpreter, inputs_of
from fisedit_compiler.inspect.subject import CheckOptions, make_subject
from fisedit_compiler.kernels.tolerances import assert_close
from fisedit_compiler.passes.order import REQUIRED, REWRITES
from fisedit_compiler.passes.rewrites.extensions import RULES
from fisedit_compiler.passes.rewrites.outputs import Outputs
from fisedit_compiler.recordings.stores import hold
from fisedit_compiler.runtime.execution.hoisting import HoistCache
from fisedit_compiler.slots.statistics import Statistics
from tests.support.compiled_zoo import (
    SEMANTICS,
    Attention,
    Norm,
    base_inputs,
    compiled_model,
    edit_inputs,
    make_mask,
    oracle,
    record_run,
)
from tests.support.zoo import ZOO

__all__ = ["rule"]  # a fixture

SIZE = (16, 24)
MASK = make_mask("block", SIZE, seed=3)
GROUP_NORM = "aten.group_norm"
CONVOLUTION = "aten.conv2d"


def own_copy(name: str = "sd21") -> SparseModule:
    """A compiled model that a test may change."""
    return copy.deepcopy(compiled_model(name))


def call(name: str = "sd21") -> dict[str, Any]:
    return base_inputs(name, 2, SIZE)


def first_of(compiled: SparseModule, operation: str, **meta: Any) -> str:
    """Name of the first captured node of an operation."""
    graph = compiled.programs[0].captured.graph
    return next(
        node.name
        for node in graph.nodes
        if str(node.target).startswith(operation) and all(node.meta.get(key) == value for key, value in meta.items())
    )


# -- programs that are right -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ZOO))
@pytest.mark.parametrize(("norm", "attention"), SEMANTICS)
def test_a_right_program_passes(name: str, norm: Norm, attention: Attention) -> None:
    compiled = compiled_model(name, norm, attention)
    for kind in ("block", "scattered"):
        report = compiled.check(make_mask(kind, SIZE, seed=3))
        assert report and report.ok and report.first is None, str(report)
        assert report.compared > len(compiled.programs[0].slots)
        assert str(report).startswith("the packed program equals the pinned one")


@pytest.mark.parametrize("disabled", sorted({p.name for p in REWRITES} - REQUIRED))
def test_leaving_a_pass_out_changes_nothing(disabled: str) -> None:
    assert compiled_model("sd21", "recorded", "active", disabled=frozenset({disabled})).check(MASK)


def test_blocks_dilation_and_half_precision() -> None:
    assert unet(block_size=4, dilation=1).check(MASK)
    assert compiled_model("sd21", dtype=torch.bfloat16).check(MASK)


@pytest.mark.parametrize(("norm", "attention"), SEMANTICS)
@pytest.mark.parametrize("name", ["sd21", "sdxl"])
def test_the_pinned_program_is_the_oracle_of_the_tests(name: str, norm: Norm, attention: Attention) -> None:
    """Two interpreters that share no code agree: on captured nodes here, on torch functions in the oracle."""
    compiled = compiled_model(name, norm, attention)
    inputs = call(name)
    edited = edit_inputs(name, 2, SIZE, MASK)
    subject = make_subject(compiled, MASK, CheckOptions(inputs=inputs, edited=edited))
    program, plan = subject.executable.program, subject.plan
    pinned = PinnedInterpreter(program, compiled.original, plan, lambda node, value: None)
    with torch.no_grad():
        (output,) = pinned.run(*inputs_of(program, subject.base, subject.edited))
    active = {plan.size(level): plan.active_mask(level) for level in plan.active}
    run = oracle(name, 2, SIZE)
    assert torch.equal(output.base, run.base_output)
    assert_close(output.pinned, run.replay(edited, active, norm=norm, attention=attention), torch.float32)


# -- a bug in each pass ----------------------------------------------------------------------------------


def test_every_pass_has_a_planted_bug() -> None:
    assert {plant.name for plant in PLANTS} == {p.name for p in REWRITES} - REQUIRED, "Outputs has a test of its own"


@pytest.mark.usefixtures("rule")
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_a_bug_in_a_pass_is_found_at_its_node(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plant.build().check(MASK)
    plant.plant(monkeypatch)
    report = plant.build().check(MASK)
    assert not report and report.first is not None
    assert report.first.node == plant.origins[0], str(report)
    # Nodes after it are judged on right inputs: what is listed are names of the same rows, not echoes.
    assert len(report.differences) <= 3, str(report)


def test_an_output_that_is_not_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Outputs, "run", lambda self, program: None)
    report = with_dense_end().check(MASK)
    assert report.first is not None
    assert (report.first.operation, report.first.what) == ("aten.cumsum", "output 0")


def test_swapped_statistics_in_the_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorded value that is wrong is named itself, at the node that reads it."""
    original = Statistics.store

    def swapped(kind: Statistics, graph: fx.Graph, *rest: Any) -> fx.Node:
        return graph.call_function(torch.ops.aten.flip.default, (original(kind, graph, *rest), [2]))

    monkeypatch.setattr(Statistics, "store", swapped)
    compiled = unet()
    report = compiled.check(MASK)
    assert report.first is not None
    assert report.first.node == first_of(compiled, GROUP_NORM)
    assert report.first.what == "slot down_blocks.0.resnets.0.norm1.statistics"
    assert {item.operation for item in report.differences} == {GROUP_NORM}


def tabulate_with(monkeypatch: pytest.MonkeyPatch, spoil: Any) -> None:
    """Spoil ring and taps of one kind of convolution: 3x3 from level 2 to level 2."""
    original = site_plan.tabulate

    def spoiled(key: Any, rows_in: Tensor, rows_out: Tensor, masks: Any) -> tuple[Tensor, Tensor]:
        ring, taps = original(key, rows_in, rows_out, masks)
        plain = key.source == key.target == 2 and key.kernel == (3, 3)
        return spoil(ring, taps) if plain else (ring, taps)

    monkeypatch.setattr(site_plan, "tabulate", spoiled)


def assert_names_the_convolutions_of_level_2(report: CheckReport, compiled: SparseModule) -> None:
    assert report.first is not None
    assert {item.operation for item in report.differences} == {CONVOLUTION}
    assert report.first.path == "down_blocks.1.resnets.0.conv1"
    assert report.first.node == first_of(compiled, CONVOLUTION, path="down_blocks.1.resnets.0.conv1")
    assert "of level 2: (" in report.first.sites


def test_a_wrong_tap(monkeypatch: pytest.MonkeyPatch) -> None:
    tabulate_with(monkeypatch, lambda ring, taps: (ring, taps.roll(1, 1)))
    compiled = unet(block_size=1)
    assert_names_the_convolutions_of_level_2(compiled.check(MASK), compiled)


def test_a_wrong_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    original = site_plan.patch_table

    def spoiled(key: Any, *rest: Any) -> Tensor:
        table = original(key, *rest)
        return table.roll(1, 1) if key.source == key.target == 2 else table

    monkeypatch.setattr(site_plan, "patch_table", spoiled)
    compiled = unet(block_size=2)
    assert_names_the_convolutions_of_level_2(compiled.check(MASK), compiled)


def test_a_missing_row_of_the_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another site is read in place of the last one of the ring: a few sites at the border of the mask differ."""

    def drop(ring: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([ring[:-1], ring[:1]]), taps

    tabulate_with(monkeypatch, drop)
    compiled = unet(block_size=1)
    report = compiled.check(make_mask("site", SIZE, seed=5))
    assert_names_the_convolutions_of_level_2(report, compiled)


def test_a_node_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    tabulate_with(monkeypatch, lambda ring, taps: (ring, taps + 10_000))
    report = unet(block_size=1).check(MASK)
    problem = report.differences[-1].problem
    assert problem.startswith(("RuntimeError: ", "IndexError: ")) and "out of" in problem, "by the path torch takes"
    assert report.differences[-1].path == "down_blocks.1.resnets.0.conv1"


def test_rows_of_another_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that cannot be compared differ, and the program goes on with the right ones."""
    plant = next(plant for plant in PLANTS if plant.name == "extensions")

    def one_row_less(node: fx.Node) -> None:
        node.target, node.args = torch.ops.aten.slice.Tensor, (node.args[0], 1, 0, -1)

    monkeypatch.setitem(RULES, THIRD, third_on_rows)
    monkeypatch.setattr(plant, "spoil", one_row_less)
    plant.plant(monkeypatch)
    (difference,) = plant.build().check(MASK).differences
    assert difference.node == plant.origins[0]
    assert difference.problem == "it is float32 [2, 53, 8] where float32 [2, 54, 8] is due"


def test_a_recording_without_a_slot() -> None:
    compiled = compiled_model("sd21")
    recording = copy.copy(record_run(compiled, call()).recording)
    (record,) = recording.calls
    slots = {name: value for name, value in record.slots.items() if name != "conv_in.input"}
    recording.calls = [replace(record, slots=hold(slots))]
    (difference,) = compiled.check(MASK, inputs=call(), recording=recording).differences
    assert difference.path == "conv_in" and difference.problem.startswith("it is missing where float32 [2, 384, 4]")


# -- what the module keeps -------------------------------------------------------------------------------


def edited_once(compiled: SparseModule, **changed: Any) -> Recording:
    """Fill the module's cache of hoisted values as a real edit does."""
    base = record_run(compiled, call())
    with compiled.edit(base.recording, MASK):
        compiled(**{**edit_inputs("sd21", 2, SIZE, MASK), **changed})
    return base.recording


def test_hoisted_values_that_are_never_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def any_group(self: HoistCache, bundle: Any, key: Any, named: Any) -> Any:
        return next((groups[-1] for groups in self._kept.get(bundle.name, {}).values() if groups), None)

    monkeypatch.setattr(HoistCache, "_find", any_group)
    report = own_copy().check(MASK, inputs=call())
    assert report.first is not None
    assert all("the cached value is not that of these inputs and weights" in item.what for item in report.differences)
    assert {item.operation for item in report.differences} >= {"aten.scaled_dot_product_attention", "aten.add.Tensor"}


def test_hoisted_values_of_other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights change, and the cache is not told: values of the weights alone are stale, and their readers named."""
    compiled = own_copy()
    edited_once(compiled)
    with torch.no_grad():
        compiled.original.down_blocks[0].resnets[0].conv1.weight.mul_(2.0)
    with monkeypatch.context() as patched:
        patched.setattr(compiled._programs.state, "read", lambda: compiled._programs.key)
        report = compiled.check(MASK)
    assert [item.path for item in report.differences] == ["down_blocks.0.resnets.0.conv1"]
    assert report.differences[0].what.startswith("hoisted pack_conv_weight")
    assert compiled.check(MASK), "told about the weights, the module computes them again"


def test_a_stale_recording() -> None:
    compiled = own_copy()
    inputs = call()
    recording = edited_once(compiled)
    assert compiled.check(MASK, inputs=inputs, recording=recording)
    with torch.no_grad():
        compiled.original.down_blocks[0].resnets[0].conv1.weight.mul_(2.0)
    report = compiled.check(MASK, inputs=inputs, recording=recording)
    assert report.first is not None and report.first.path == "down_blocks.0.resnets.0.norm2"
    assert all(item.what.startswith("slot ") for item in report.differences)


def test_a_recording_of_other_inputs() -> None:
    compiled = compiled_model("sd21")
    recording = record_run(compiled, call()).recording
    other = {**call(), "sample": call()["sample"] + 1.0}
    report = compiled.check(MASK, inputs=other, recording=recording)
    assert report.first is not None and report.first.what == "slot conv_in.input"


def test_a_check_leaves_the_module_as_it_was() -> None:
    compiled = own_copy()
    recording = edited_once(compiled)
    (executable,) = compiled._programs.executables()
    cache, state = executable.hoisted, torch.get_rng_state()
    before = (
        dict(cache.computed),
        cache.nbytes,
        [len(kept) for kept in cache._kept.values()],
        list(executable.plans.recent),
    )
    assert compiled.check(MASK) and compiled.check(MASK, inputs=call(), recording=recording)
    assert executable.hoisted is cache and torch.equal(torch.get_rng_state(), state)
    assert before == (
        dict(cache.computed), cache.nbytes, [len(kept) for kept in cache._kept.values()], list(executable.plans.recent)
    )  # fmt: skip
    with compiled.edit(recording, MASK):
        compiled(**edit_inputs("sd21", 2, SIZE, MASK))
    assert dict(cache.computed) == before[0], "what an edit had computed is still known"


# -- arguments -------------------------------------------------------------------------------------------


def test_the_users_own_calls() -> None:
    compiled = compiled_model("sd21")
    inputs, edited = call(), edit_inputs("sd21", 2, SIZE, MASK)
    assert compiled.check(MASK, inputs=inputs, edited=edited)
    assert compiled.check(MASK.repeat_interleave(8, 0).repeat_interleave(8, 1).numpy(), inputs=inputs)


def test_a_tolerance() -> None:
    compiled = compiled_model("sd21")
    report = compiled.check(MASK, tolerance=0.0)
    assert not report, "roundings differ"
    assert max(item.error for item in report.differences) < 1e-3
    with pytest.raises(ConfigError, match=r"tolerance=-1 must be a relative error, 0 or more"):
        compiled.check(MASK, tolerance=-1)


def test_the_report_is_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    tabulate_with(monkeypatch, lambda ring, taps: (ring, taps.roll(1, 1)))
    text = str(unet(block_size=1).check(MASK))
    first, subject, *table = text.splitlines()
    assert first.startswith("first difference: conv2d_") and "= aten.conv2d in down_blocks.1.resnets.0.conv1" in first
    assert "resnet.py:" in first and "rows: largest error" in first and "allowed" in first and "of level 2: (" in first
    assert subject == "54 of 384 sites active, norm='recorded', attention='cached'"
    assert "values differ" in "".join(table) and "down_blocks.1.resnets.0.conv1" in "".join(table)


def test_what_cannot_be_checked_is_refused() -> None:
    compiled = compiled_model("sd21")
    with compiled.record(), pytest.raises(ModeError, match=r"check\(\) was entered while record\(\) is active"):
        compiled.check(MASK)
    with pytest.raises(MaskError, match="The mask is empty"):
        compiled.check(torch.zeros(SIZE, dtype=torch.bool))
    with pytest.raises(MaskError, match="The mask is 6x10, but the model scales its maps down to 1/4"):
        compiled.check(torch.ones(6, 10, dtype=torch.bool))
    with pytest.raises(MaskError, match="A mask that is a file has no size of its own"):
        compiled.check("mask.png")
    with pytest.raises(ConfigError, match="edited= without inputs="):
        compiled.check(MASK, edited=call())
    recording = record_run(compiled, call()).recording
    with pytest.raises(ConfigError, match="recording= without inputs="):
        compiled.check(MASK, recording=recording)
    with pytest.raises(RecordingError, match="The recording has 1 calls; there is no call 3"):
        compiled.check(MASK, inputs=call(), recording=recording, call=3)
    with pytest.raises(RecordingError, match="Pass the arguments of that call"):
        compiled.check(make_mask("block", (8, 24)), inputs=base_inputs("sd21", 2, (8, 24)), recording=recording)
    with pytest.raises(RecordingError, match="calls of other shapes or arguments"):
        compiled.check(MASK, inputs=call(), edited=base_inputs("sd21", 2, (8, 24)))
    with pytest.raises(ConfigError, match="There are 1 programs"):
        compiled.check(MASK, program=2)
    with pytest.raises(ConfigError, match="Nothing is compiled yet"):
        sparsify(ZOO["plain_conv"]().module, SparsifyConfig()).check(MASK)
