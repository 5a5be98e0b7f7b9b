"""``compiled.bisect(mask)``: the pass at fault is named, and so is a fault that is in no pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planted import PLANTS, Plant, rule, unet, with_dense_end

from fisedit_compiler.errors import ModeError, VerificationError
from fisedit_compiler.passes.rewrites.group_norm import GroupNorm
from fisedit_compiler.passes.rewrites.outputs import Outputs
from fisedit_compiler.runtime.execution.hoisting import HoistCache
from tests.support.compiled_zoo import base_inputs, compiled_model, make_mask, record_run

__all__ = ["rule"]  # a fixture

SIZE = (16, 24)
MASK = make_mask("block", SIZE, seed=3)


@pytest.mark.usefixtures("rule")
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_the_pass_at_fault_is_named(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant.plant(monkeypatch)
    report = plant.build().bisect(MASK)
    assert not report
    assert report.pass_name == plant.name, str(report)
    assert report.first is not None and report.first.node == plant.origins[0]
    assert f"pass '{plant.name}' is at fault" in str(report) and str(report.first) in str(report)
    assert len(report.trials) <= 6, "the prefixes are halved, not tried one by one"


def test_the_pass_that_always_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Outputs, "run", lambda self, program: None)
    report = with_dense_end().bisect(MASK)
    assert report.pass_name == "outputs" and report.first is not None
    assert report.first.operation == "aten.cumsum"
    assert report.conclusion.startswith("pass 'outputs', which always runs, is at fault")


def test_a_pass_that_no_longer_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module was compiled by a pass that is spoiled, which by now does not even run through."""
    plant = next(plant for plant in PLANTS if plant.name == "group_norm")
    with monkeypatch.context() as patched:
        plant.plant(patched)
        compiled = plant.build()

    def broken(self: GroupNorm, program: Any) -> None:
        raise VerificationError("After pass group_norm: something is wrong.")

    monkeypatch.setattr(GroupNorm, "run", broken)
    report = compiled.bisect(MASK)
    assert report.pass_name == "group_norm" and "VerificationError: After pass group_norm" in str(report)


def test_nothing_to_find() -> None:
    report = compiled_model("sd21").bisect(MASK)
    assert report and report.pass_name is None and report.first is None and not report.trials
    assert str(report).startswith("nothing to find: the packed program equals the pinned one")


def test_a_fault_in_what_all_programs_share(monkeypatch: pytest.MonkeyPatch) -> None:
    def any_group(self: HoistCache, bundle: Any, key: Any, named: Any) -> Any:
        return next((groups[-1] for groups in self._kept.get(bundle.name, {}).values() if groups), None)

    monkeypatch.setattr(HoistCache, "_find", any_group)
    report = unet().bisect(MASK)
    assert not report and report.pass_name is None
    assert "fails even with every pass left out" in report.conclusion


def test_a_fault_in_what_the_module_keeps() -> None:
    compiled = compiled_model("sd21")
    inputs: dict[str, Any] = base_inputs("sd21", 2, SIZE)
    recording = record_run(compiled, inputs).recording
    report = compiled.bisect(MASK, inputs={**inputs, "sample": inputs["sample"] + 1.0}, recording=recording)
    assert not report and report.pass_name is None and report.first is not None
    assert report.conclusion.startswith("no pass is at fault: compiled anew, the program is right")


def test_a_mode_is_in_the_way() -> None:
    compiled = compiled_model("sd21")
    with compiled.record(), pytest.raises(ModeError, match=r"bisect\(\) was entered while record\(\) is active"):
        compiled.bisect(torch.ones(SIZE, dtype=torch.bool))
