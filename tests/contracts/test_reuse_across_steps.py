"""Reuse across steps: shallow calls compute the pinned program, keep the outside, and can be edited in turn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fisedit_compiler import Recording, SparsifyConfig, sparsify
from fisedit_compiler.errors import ConfigError
from fisedit_compiler.kernels.tolerances import assert_close
from fisedit_compiler.passes.programs.reuse import Cut
from fisedit_compiler.runtime.execution.held_rows import HeldRows
from fisedit_compiler.runtime.sessions.edit_session import EditSession
from fisedit_compiler.runtime.sessions.reuse import shallow_calls
from tests.reference.held import HeldOutput
from tests.reference.pinned import PinnedRun
from tests.support.compiled_zoo import (
    SEMANTICS,
    Attention,
    Norm,
    Size,
    active_sets,
    compiled_model,
    make_mask,
    output_of,
    zoo_model,
)
from tests.support.zoo import UNETS, Inputs

CALLS = 4
SHALLOW = (False, True, False, True)
SIZE: Size = (20, 12)
LOOSE = 1e9
"""A tolerance that any movement is within."""


def calls_of(name: str, batch: int, seed: int = 0) -> list[Inputs]:
    """Base inputs of a run: another latent and timestep at every call."""
    model = zoo_model(name)
    made = [model.make_inputs(batch, *SIZE, seed + number) for number in range(CALLS)]
    return [{**inputs, "encoder_hidden_states": made[0]["encoder_hidden_states"]} for inputs in made]


def edits_of(name: str, calls: list[Inputs], mask: Tensor) -> list[Inputs]:
    return [zoo_model(name).edit_inputs(inputs, mask) for inputs in calls]


def planned(session: EditSession, shallow: tuple[bool, ...] = SHALLOW) -> None:
    """Let the session make exactly these calls shallow."""
    session.reuse.shallow = shallow


def recorded(name: str, norm: Norm, attention: Attention, calls: list[Inputs]) -> tuple[Recording, list[Tensor]]:
    compiled = compiled_model(name, norm, attention)
    with compiled.record() as recording:
        outputs = [output_of(compiled(**inputs)) for inputs in calls]
    return recording, outputs


def cut_module(name: str) -> torch.nn.Module:
    """What the finest level reads from below, as a person who knows the model says: the last upsampler."""
    module = zoo_model(name).module
    if name in UNETS:
        return [block for block in module.up_blocks if block.upsamplers][-1].upsamplers[0]
    return module.up


@pytest.mark.parametrize(("norm", "attention"), SEMANTICS)
@pytest.mark.parametrize("name", UNETS)
def test_shallow_calls_equal_the_oracle(name: str, norm: Norm, attention: Attention) -> None:
    compiled, calls = compiled_model(name, norm, attention), calls_of(name, 2)
    recording, outputs = recorded(name, norm, attention, calls)
    for kind in ("block", "scattered", "border", "full"):
        mask = make_mask(kind, SIZE, seed=3)
        inputs, held = edits_of(name, calls, mask), HeldOutput(cut_module(name))
        with compiled.edit(recording, mask, reuse=LOOSE) as session:
            planned(session)
            packed = [output_of(compiled(**each)) for each in inputs]
        assert [kind for kind, _ in session.timings] == ["sparse", "shallow"] * 2
        for number, (base, edit) in enumerate(zip(calls, inputs, strict=True)):
            held.shallow = SHALLOW[number]
            run = PinnedRun(zoo_model(name).module, base, pin_inputs_of=zoo_model(name).dense_functions)
            pinned = run.replay(edit, active_sets(session), norm=norm, attention=attention, held=held)
            assert_close(packed[number], pinned, torch.float32)
            outside = ~mask
            assert torch.equal(packed[number][..., outside], outputs[number][..., outside])


@pytest.mark.parametrize("norm", ["recorded", "incremental"])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_an_edit_of_such_an_edit_equals_the_oracle(name: str, norm: Norm) -> None:
    """Also where the second edit makes a full call of what the first one made a shallow call of."""
    compiled, calls = compiled_model(name, norm), calls_of(name, 2)
    recording, _ = recorded(name, norm, "cached", calls)
    first, second = make_mask("block", SIZE, seed=3), make_mask("scattered", SIZE, seed=4)
    inputs, held = edits_of(name, calls, first), HeldOutput(cut_module(name))
    with compiled.edit(recording, first, record=True, reuse=LOOSE) as session:
        planned(session)
        packed = [output_of(compiled(**each)) for each in inputs]
    sets, result = active_sets(session), session.result
    assert result is not None
    runs = []
    for number, base in enumerate(calls):
        held.shallow = SHALLOW[number]
        runs.append(PinnedRun(zoo_model(name).module, base).continued(inputs[number], sets, norm=norm, held=held))
        assert_close(packed[number], runs[number].base_output, torch.float32)
    again = edits_of(name, inputs, second)
    for plan in (SHALLOW, (False,) * CALLS, (False, False, True, True)):
        held = HeldOutput(cut_module(name))
        with compiled.edit(result, second, record=True, reuse=LOOSE) as session:
            planned(session, plan)
            turned = [output_of(compiled(**each)) for each in again]
        assert session.result is not None
        for number in range(CALLS):
            held.shallow = plan[number]
            pinned = runs[number].replay(again[number], active_sets(session), norm=norm, held=held)
            assert_close(turned[number], pinned, torch.float32)
            assert torch.equal(turned[number][..., ~second], packed[number][..., ~second])
            output = session.result.slot(number, compiled.programs[0].outputs[0].slot or "")
            assert torch.equal(output, turned[number])


# -- other forms of edits ---------------------------------------------------------------------------------------------


def run(name: str, mask: Tensor, inputs: list[Inputs], recording: Recording, **options: Any) -> list[Tensor]:
    """The outputs of an edit whose calls are shallow as :data:`SHALLOW` says."""
    compiled = compiled_model(name)
    with compiled.edit(recording, mask, reuse=LOOSE, **options) as session:
        planned(session)
        outputs = [output_of(compiled(**each)) for each in inputs]
    assert [kind for kind, _ in session.timings] == ["sparse", "shallow"] * 2
    return outputs


def test_recording_an_edit_changes_nothing_of_it() -> None:
    calls, mask = calls_of("sd15", 2), make_mask("block", SIZE, seed=3)
    recording, _ = recorded("sd15", "recorded", "cached", calls)
    inputs = edits_of("sd15", calls, mask)
    plain, kept = run("sd15", mask, inputs, recording), run("sd15", mask, inputs, recording, record=True)
    assert all(map(torch.equal, plain, kept))


def test_a_shallow_call_records_what_it_computed_and_shares_the_rest() -> None:
    compiled, calls, mask = compiled_model("sd15"), calls_of("sd15", 2), make_mask("block", SIZE, seed=3)
    recording, _ = recorded("sd15", "recorded", "cached", calls)
    with compiled.edit(recording, mask, record=True, reuse=LOOSE) as session:
        planned(session)
        for each in edits_of("sd15", calls, mask):
            compiled(**each)
    result, program = session.result, compiled.programs[0]
    assert result is not None and isinstance(program.cut, Cut)
    deep, own = program.cut.deep, {slot.name for slot in program.slots} - program.cut.deep
    assert list(result.calls[1].slots) == list(recording.calls[1].slots)
    assert all(torch.equal(result.slot(1, name), result.slot(0, name)) for name in deep)
    changed = {update.slot for update in program.reuse.updates}
    assert changed and changed <= own
    assert all(not torch.equal(result.slot(1, name), recording.slot(1, name)) for name in changed)
    assert result.calls[1].own_nbytes < result.calls[0].own_nbytes
    assert result.nbytes >= recording.nbytes


@pytest.mark.parametrize("record", [False, True])
def test_copies_are_the_edits_made_alone(record: bool) -> None:
    compiled, calls = compiled_model("sd15"), calls_of("sd15", 2)
    recording, outputs = recorded("sd15", "recorded", "cached", calls)
    masks = [make_mask("block", SIZE, seed=3), make_mask("site", SIZE, seed=5)]
    both = masks[0] | masks[1]
    inputs = [edits_of("sd15", calls, mask) for mask in masks]
    repeated = [
        {key: _interleaved(first[key], second[key]) for key in first} for first, second in zip(*inputs, strict=True)
    ]
    with compiled.edit(recording, masks, copies=2, record=record, reuse=LOOSE) as session:
        planned(session)
        together = [output_of(compiled(**each)) for each in repeated]
    assert [kind for kind, _ in session.timings] == ["sparse", "shallow"] * 2
    for copy, mask in enumerate(masks):
        alone = run("sd15", both, inputs[copy], recording)
        for number, output in enumerate(together):
            mine = output.unflatten(0, (2, 2))[:, copy]
            expected = torch.where(mask, alone[number], outputs[number])
            assert_close(mine, expected, torch.float32)
            assert torch.equal(mine[..., ~mask], outputs[number][..., ~mask])
            if record:
                slot = compiled.programs[0].outputs[0].slot or ""
                assert torch.equal(session.results[copy].slot(number, slot), mine)


def _interleaved(first: Any, second: Any) -> Any:
    if isinstance(first, dict):
        return {key: _interleaved(first[key], second[key]) for key in first}
    if isinstance(first, Tensor) and first.ndim:
        return torch.stack([first, second], dim=1).flatten(0, 1)
    return first


def test_the_first_sparse_call_is_full_whenever_the_mask_comes() -> None:
    compiled, calls, mask = compiled_model("sd15"), calls_of("sd15", 2), make_mask("block", SIZE, seed=3)
    recording, _ = recorded("sd15", "recorded", "cached", calls)
    with compiled.edit(recording, reuse=LOOSE) as session:
        for number, each in enumerate(edits_of("sd15", calls, mask)):
            compiled(**each)
            if number < 2:
                session.set_mask(mask)
    assert [kind for kind, _ in session.timings] == ["dense", "sparse", "sparse", "shallow"]


def test_above_the_break_even_nothing_is_shallow() -> None:
    calls, mask = calls_of("sd15", 2), make_mask("full", SIZE)
    compiled = sparsify(zoo_model("sd15").module, SparsifyConfig(dense_above=0.5, reuse=LOOSE))
    with compiled.record() as recording:
        for each in calls:
            compiled(**each)
    with compiled.edit(recording, mask) as session:
        for each in edits_of("sd15", calls, mask):
            compiled(**each)
    assert [kind for kind, _ in session.timings] == ["dense"] * CALLS


def test_rows_of_another_edit_are_never_taken() -> None:
    """Rows of other sites, of another batch or program are never taken."""
    compiled, calls, mask = compiled_model("sd15"), calls_of("sd15", 2), make_mask("block", SIZE, seed=3)
    (executable,) = compiled._programs.executables()
    sample, held = calls[0]["sample"], HeldRows()
    plan, other = (executable.plans.of(each, 0, sample) for each in (mask, make_mask("site", SIZE)))
    assert not held.fit(executable.program, plan, sample)
    rows = [torch.zeros(2, plan.rows(1), 32)]  # type: ignore[arg-type]
    held.keep(rows, executable.program, plan, sample)
    assert held.fit(executable.program, plan, sample)
    assert not held.fit(executable.program, other, sample) and not held.fit(executable.program, plan, sample[:1])
    held.drop()
    assert not held.fit(executable.program, plan, sample)


# -- the plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("movement", "tolerance", "shallow"),
    [
        ([None, 0.5, 0.1, 0.1, 0.1, 0.1], 0.25, "FFSSFS"),
        ([None, 0.5, 0.1, 0.1, 0.1, 0.1], 0.05, "FFFFFF"),
        ([None, 0.5, 0.1, 0.1, 0.1, 0.1], 9.0, "FSSSSS"),
        ([None, 0.1, None, 0.1, 0.1], 0.15, "FSFSF"),
        ([0.0, 0.0], 1.0, "FS"),
        ([None, math.nan, 0.1], 1.0, "FFS"),
        ([], 1.0, ""),
    ],
)
def test_calls_are_shallow_while_the_base_stays_within_the_tolerance(
    movement: list[float | None], tolerance: float, shallow: str
) -> None:
    assert "".join("S" if each else "F" for each in shallow_calls(movement, tolerance)) == shallow


def test_a_recording_knows_how_far_its_calls_moved() -> None:
    calls, name = calls_of("sd15", 2), "up_blocks.1.upsamplers.0.conv.input"
    recording, _ = recorded("sd15", "recorded", "cached", calls)
    assert recording.calls[0].movement is None
    for number in range(1, CALLS):
        before, now = recording.slot(number - 1, name).double(), recording.slot(number, name).double()
        moved = recording.calls[number].movement
        assert moved is not None and float(moved) == pytest.approx(float((now - before).norm() / now.norm()))
    mask = make_mask("block", SIZE)
    with compiled_model("sd15").edit(recording, mask, record=True) as session:
        for each in edits_of("sd15", calls, mask):
            compiled_model("sd15")(**each)
    assert session.result is not None
    assert [call.movement for call in session.result] == [call.movement for call in recording]


def test_it_is_off_unless_it_is_asked_for() -> None:
    assert SparsifyConfig().reuse == "off"
    calls, mask = calls_of("sd15", 2), make_mask("block", SIZE)
    recording, _ = recorded("sd15", "recorded", "cached", calls)
    for options in ({}, {"reuse": "off"}, {"reuse": 1e-9}):
        with compiled_model("sd15").edit(recording, mask, **options) as session:
            for each in edits_of("sd15", calls, mask):
                compiled_model("sd15")(**each)
        assert [kind for kind, _ in session.timings] == ["sparse"] * CALLS


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [0, 0.0, -1.0, math.nan, True, "yes", None, "0.1"])
def test_what_is_no_tolerance_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="tolerance above 0"):
        SparsifyConfig(reuse=wrong)
    if wrong is not None:  # what the configuration says
        recording, _ = recorded("sd15", "recorded", "cached", calls_of("sd15", 2))
        with pytest.raises(ConfigError, match="tolerance above 0"), compiled_model("sd15").edit(recording, reuse=wrong):
            pass


@pytest.mark.parametrize("name", ["vae_decoder", "reflect"])
def test_a_model_without_a_cut_refuses_a_tolerance_and_ignores_auto(name: str) -> None:
    model, compiled = zoo_model(name), compiled_model(name)
    inputs, mask = model.make_inputs(1, *SIZE, 0), make_mask("block", SIZE)
    with compiled.record() as recording:
        compiled(**inputs)
        compiled(**inputs)
    assert [call.movement for call in recording] == [None, None]
    edit = model.edit_inputs(inputs, mask)
    with (
        pytest.raises(ConfigError, match="the model offers no place where"),
        compiled.edit(recording, mask, reuse=0.1),
    ):
        compiled(**edit)
    with compiled.edit(recording, mask, reuse="auto") as session:
        compiled(**edit)
        compiled(**edit)
    assert [kind for kind, _ in session.timings] == ["sparse", "sparse"]


# -- being seen -------------------------------------------------------------------------------------------------------


def test_explain_names_the_cut_the_plan_and_the_cost() -> None:
    compiled, calls, mask = compiled_model("sd15"), calls_of("sd15", 2), make_mask("block", SIZE, seed=3)
    recording, _ = recorded("sd15", "recorded", "cached", calls)
    assert "a call can take up_blocks.1.upsamplers.0.conv from an earlier one; reuse is off" in str(compiled.explain())
    with compiled.edit(recording, mask, reuse=LOOSE) as session:
        planned(session)
        for each in edits_of("sd15", calls, mask):
            compiled(**each)
    said = session.explain()
    assert "2 of 4 calls do (numbers 1, 3)" in str(said)
    work = {row.name: row for row in said.programs[0].work}
    assert work["shallow step"].when == "in 2 of 4 calls"
    assert work["shallow step"].measured is not None
    assert 0 < (work["shallow step"].flops or 0) < (work["step"].flops or 0)
    decoder = compiled_model("vae_decoder")
    assert "nothing can be reused across steps: its output" in str(decoder.explain())


@pytest.mark.parametrize("name", ["sd15", "plain_conv"])
def test_check_runs_the_cut_step_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo_model(name)
    example = None if name in UNETS else model.make_inputs(2, 8, 16, 0)
    config = SparsifyConfig(reuse="auto", multiple=None if name in UNETS else model.multiple)
    compiled = sparsify(model.module, config, example_inputs=example)
    mask = make_mask("block", SIZE, seed=3)
    assert compiled.check(mask)
    keep = HeldRows.keep
    monkeypatch.setattr(HeldRows, "keep", lambda self, rows, *rest: keep(self, [row + 1 for row in rows], *rest))
    report = compiled.check(mask)
    assert not report and report.first is not None and "output of a shallow call" in report.first.what
