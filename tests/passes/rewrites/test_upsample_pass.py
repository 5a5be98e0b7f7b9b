"""Nearest upsampling that no convolution reads becomes a gather of parents."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from torch import nn

from tests.support.pass_tools import Forward, assert_equals_oracle, compile_small, counts, program_of, reasons


@pytest.mark.parametrize("factor", [2, 3])
def test_nearest_gathers_parents(factor: int) -> None:
    module = Forward(
        lambda m, x: F.silu(F.interpolate(m.conv(x), scale_factor=float(factor), mode="nearest")),
        conv=nn.Conv2d(8, 8, 3, padding=1),
    )
    compiled = compile_small(module)
    program = program_of(compiled)
    assert program.operations["aten.upsample_nearest2d.vec"] == 1
    after = counts(program.step)
    assert not [name for name in after if "upsample" in name]
    assert after["fisedit.gather_sites"] == 2 and not program.refusals
    assert not [slot for slot in program.slots if slot.kind.name == "canvas" and slot.origin == "conv2d"]
    assert_equals_oracle(compiled)


def test_other_modes_stay_dense_with_a_reason() -> None:
    module = Forward(
        lambda m, x: m.conv(F.interpolate(m.conv(x), scale_factor=2.0, mode="bilinear")),
        conv=nn.Conv2d(8, 8, 1),
    )
    compiled = compile_small(module)
    program = program_of(compiled)
    (name,) = (name for name in counts(program.step) if "bilinear" in name)
    assert name in reasons(program)[name]
    assert_equals_oracle(compiled, {"interpolate"})


def test_nearest_of_rows_and_columns_apart_stays_dense() -> None:
    """Twice the height and thrice the width is no level; the pooling behind brings the map back to one."""
    module = Forward(
        lambda m, x: F.avg_pool2d(F.interpolate(m.conv(x), scale_factor=(2.0, 3.0), mode="nearest"), (2, 3)),
        conv=nn.Conv2d(8, 8, 3, padding=1),
    )
    compiled = compile_small(module)
    program = program_of(compiled)
    (name,) = (name for name in counts(program.step) if "upsample" in name)
    assert "height is scaled by" in reasons(program)[name]
    assert_equals_oracle(compiled, {"interpolate"})


def test_nearest_by_one_and_a_half_stays_dense() -> None:
    module = Forward(
        lambda m, x: F.relu(F.interpolate(m.conv(x), size=(x.shape[2] * 3 // 2, x.shape[3] * 3 // 2))),
        conv=nn.Conv2d(8, 8, 3, padding=1),
    )
    compiled = compile_small(module, multiple=2)
    program = program_of(compiled)
    (name,) = (name for name in counts(program.step) if "upsample" in name)
    assert "whole factor" in reasons(program)[name]
