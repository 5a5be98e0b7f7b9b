"""Edits that are recorded and edited in turn: what the second one starts from, and that a chain stays true."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fisedit_compiler import Recording, SparseModule
from fisedit_compiler.kernels.tolerances import assert_close
from tests.reference.pinned import PinnedRun
from tests.support.compiled import HEIGHT, STEPS, WIDTH, box, denoise, model_and_compiled, other_text
from tests.support.zoo import Inputs

FIRST = box(4, 6, 12, 16)
INSIDE_FIRST = box(6, 8, 10, 13)
ELSEWHERE = box(9, 17, 16, 24)
NORMS = ("recorded", "incremental")


def edit(
    compiled: SparseModule, recording: Recording, mask: Tensor, inputs: Inputs, steps: int = STEPS
) -> tuple[Tensor, Recording]:
    with compiled.edit(recording, mask, record=True) as session:
        result = denoise(compiled, inputs, steps)
    assert session.result is not None
    return result, session.result


@pytest.fixture(params=NORMS)
def compiled(request: pytest.FixtureRequest) -> SparseModule:
    return model_and_compiled("sd15", norm=request.param)[1]


@pytest.fixture
def inputs() -> Inputs:
    return model_and_compiled()[0].make_inputs(2, HEIGHT, WIDTH)


def test_a_recorded_edit_computes_what_an_unrecorded_one_does(compiled: SparseModule, inputs: Inputs):
    with compiled.record() as recording:
        denoise(compiled, inputs)
    recorded, _ = edit(compiled, recording, FIRST, other_text(inputs))
    with compiled.edit(recording, FIRST) as session:
        plain = denoise(compiled, other_text(inputs))
    assert session.result is None
    assert torch.equal(recorded, plain)


def test_identity_edit_of_an_edit_reproduces_it(compiled: SparseModule, inputs: Inputs):
    with compiled.record() as recording:
        denoise(compiled, inputs)
    first, result = edit(compiled, recording, FIRST, other_text(inputs))
    assert result.complete and result.num_calls == STEPS
    # Within the first mask only: sites outside it kept the base's values, which a new run of the same text would not.
    for mask in (FIRST, INSIDE_FIRST):
        again, _ = edit(compiled, result, mask, other_text(inputs))
        assert_close(again, first, torch.float32)
        assert torch.equal(again[..., ~mask], first[..., ~mask])


def test_a_second_edit_keeps_the_first_outside_its_mask(compiled: SparseModule, inputs: Inputs):
    with compiled.record() as recording:
        base = denoise(compiled, inputs)
    first, result = edit(compiled, recording, FIRST, other_text(inputs))
    second, _ = edit(compiled, result, ELSEWHERE, other_text(inputs, seed=2))
    assert torch.equal(second[..., ~ELSEWHERE], first[..., ~ELSEWHERE])
    assert torch.equal(second[..., ~(FIRST | ELSEWHERE)], base[..., ~(FIRST | ELSEWHERE)])
    assert not torch.equal(second[..., ELSEWHERE], first[..., ELSEWHERE])


def test_an_empty_edit_passes_its_base_on(compiled: SparseModule, inputs: Inputs):
    with compiled.record() as recording:
        base = denoise(compiled, inputs)
    result, copied = edit(compiled, recording, torch.zeros_like(FIRST), other_text(inputs))
    assert torch.equal(result, base)
    again, _ = edit(compiled, copied, FIRST, other_text(inputs))
    direct, _ = edit(compiled, recording, FIRST, other_text(inputs))
    assert torch.equal(again, direct)


def test_an_edit_that_starts_densely_is_a_recording_too(compiled: SparseModule, inputs: Inputs):
    """As the automatic mask does: a dense first call, its sample set back outside the mask, then sparse calls."""
    with compiled.record() as recording:
        base = compiled(**inputs)[0]
        compiled(**inputs)
    text = other_text(inputs)
    with compiled.edit(recording, record=True) as session:
        assert torch.equal(compiled(**text)[0], compiled.original(**text)[0])
        session.set_mask(FIRST)
        edited = compiled(**text)[0]
    assert [kind for kind, _ in session.timings] == ["dense", "sparse"]
    assert session.result is not None and session.result.num_calls == 2
    with compiled.edit(session.result, INSIDE_FIRST):
        assert_close(compiled(**text)[0], compiled.original(**text)[0], torch.float32)
        again = compiled(**text)[0]
    assert_close(again, edited, torch.float32)
    assert torch.equal(again[..., ~FIRST], base[..., ~FIRST])


@contextmanager
def norm_inputs(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What every GroupNorm of a run reads, by the norm's path."""
    seen: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        return lambda _, args: seen.update({path: args[0].detach().clone()})

    norms = [(path, part) for path, part in module.named_modules() if isinstance(part, nn.GroupNorm)]
    handles = [part.register_forward_pre_hook(keep(path)) for path, part in norms]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def test_incremental_statistics_are_those_of_the_pinned_canvas(inputs: Inputs):
    model, compiled = model_and_compiled("sd15", norm="incremental")
    text = other_text(inputs)
    with compiled.record() as recording:
        compiled(**inputs)
    with compiled.edit(recording, FIRST, record=True) as session:
        compiled(**text)
    assert session.plan is not None and session.result is not None
    plan = session.plan
    active = {plan.size(level): plan.active_mask(level) for level in plan.active}
    with norm_inputs(model.module) as base:
        run = PinnedRun(model.module, inputs)
    with norm_inputs(model.module) as edited:
        run.replay(text, active, norm="incremental")
    assert len(base) > 10
    for path in base:
        pinned = torch.where(active[tuple(base[path].shape[-2:])], edited[path], base[path])
        groups = model.module.get_submodule(path).num_groups
        statistics = torch.ops.fisedit.group_norm_statistics(pinned, groups)
        assert_close(session.result.slot(0, f"{path}.statistics"), statistics, torch.float32)
        sums = torch.ops.fisedit.group_norm_site_sums(pinned.flatten(2), statistics, groups)
        assert_close(session.result.slot(0, f"{path}.site_sums"), sums, torch.float32)


def test_recorded_statistics_stay_the_bases(inputs: Inputs):
    _, compiled = model_and_compiled("sd15", norm="recorded")
    with compiled.record() as recording:
        compiled(**inputs)
    with compiled.edit(recording, FIRST, record=True) as session:
        compiled(**other_text(inputs))
    assert session.result is not None
    statistics = [name for name in recording.calls[0].slots if name.endswith(".statistics")]
    assert statistics
    assert all(torch.equal(session.result.slot(0, name), recording.slot(0, name)) for name in statistics)


def test_a_chain_of_five_edits_stays_true(compiled: SparseModule, inputs: Inputs):
    """Each edit changes its own place and nothing else; rounding errors of the statistics do not pile up."""
    with compiled.record() as recording:
        base = denoise(compiled, inputs)
    previous, union = base, torch.zeros_like(FIRST)
    for number in range(5):
        mask = box(3 * number, 2 * number, 3 * number + 4, 2 * number + 9)
        union |= mask
        current, recording = edit(compiled, recording, mask, other_text(inputs, seed=number + 2))
        assert bool(current.isfinite().all())
        assert torch.equal(current[..., ~mask], previous[..., ~mask])
        previous = current
    assert torch.equal(previous[..., ~union], base[..., ~union])
    assert previous.abs().max() < 2 * base.abs().max()
    again, _ = edit(compiled, recording, mask, other_text(inputs, seed=number + 2))
    assert_close(again, previous, torch.float32)


def test_statistics_after_a_chain_are_still_those_of_their_site_sums(inputs: Inputs):
    """Both follow the edits on ways of their own; sums that no longer fit would poison every later edit."""
    model, compiled = model_and_compiled("sd15", norm="incremental")
    with compiled.record() as recording:
        compiled(**inputs)
    changed = inputs
    for number in range(5):
        mask = box(2, 2 + number, 12, 14 + number)
        changed = model.edit_inputs(changed, mask, seed=number)
        with compiled.edit(recording, mask, record=True) as session:
            compiled(**changed)
        assert session.result is not None
        recording = session.result
    names = [name.removesuffix(".site_sums") for name in recording.calls[0].slots if name.endswith(".site_sums")]
    assert len(names) > 10
    for name in names:
        norm = model.module.get_submodule(name)
        sums = recording.slot(0, f"{name}.site_sums").double()
        values = sums.shape[1] * norm.num_channels // norm.num_groups
        mean_error, variance = (sums.sum(dim=1) / values).unbind(-1)
        recorded = recording.slot(0, f"{name}.statistics").double()[..., 1]
        torch.testing.assert_close(variance, recorded, rtol=1e-4, atol=1e-6)
        assert bool((mean_error.abs() < 1e-5 * recorded.sqrt()).all())


def test_plans_are_kept_per_mask(inputs: Inputs):
    _, compiled = model_and_compiled()
    with compiled.record() as recording:
        compiled(**inputs)

    def plan_of(mask: Tensor) -> Any:
        with compiled.edit(recording, mask) as session:
            compiled(**inputs)
        return session.plan

    first = plan_of(FIRST)
    assert plan_of(FIRST.clone()) is first
    assert plan_of(ELSEWHERE) is not first
    assert first.rows(Fraction(1)) == int(FIRST.sum())


def test_timings_tell_how_each_call_ran(inputs: Inputs):
    _, compiled = model_and_compiled()
    with compiled.record() as recording:
        denoise(compiled, inputs)
    kinds = {}
    for name, mask in (("sparse", FIRST), ("dense", None), ("skipped", torch.zeros_like(FIRST))):
        with compiled.edit(recording, mask) as session:
            denoise(compiled, other_text(inputs))
        kinds[name] = session.timings
        assert session.call == STEPS
    for name, timings in kinds.items():
        assert [kind for kind, _ in timings] == [name] * STEPS
        assert all(seconds > 0 for _, seconds in timings)
