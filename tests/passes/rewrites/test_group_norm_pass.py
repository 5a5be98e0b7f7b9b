"""``group_norm`` becomes ``group_norm_sites`` with recorded or corrected statistics."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn
from torch.nn import functional

from fisedit_compiler.slots.statistics import Statistics
from tests.support.pass_tools import (
    CHANNELS,
    Forward,
    assert_equals_oracle,
    assert_full_mask_is_dense,
    compile_small,
    counts,
    program_of,
    reasons,
)

GROUPS = (1, 2, CHANNELS // 2, CHANNELS)


def normed(**norm: Any) -> Forward:
    layers = {"conv": nn.Conv2d(8, 8, 3, padding=1), "norm": nn.GroupNorm(2, 8, **norm)}
    return Forward(lambda m, x: m.norm(m.conv(x)), **layers)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("norm", ["recorded", "incremental"])
def test_on_maps(norm: str, affine: bool) -> None:
    compiled = compile_small(normed(affine=affine, eps=1e-3), norm=norm)
    program = program_of(compiled)
    after = counts(program.step)
    assert program.operations["aten.group_norm"] == 1 and after["aten.group_norm"] == 0
    assert after["fisedit.group_norm_sites"] == 1
    assert after["fisedit.update_statistics"] == (norm == "incremental")
    kinds = {slot.name: slot.kind.name for slot in program.slots}
    assert kinds["norm.statistics"] == "statistics"
    assert ("site_sums" in kinds.values()) == (norm == "incremental")
    assert_equals_oracle(compiled)


@pytest.mark.parametrize("norm", ["recorded", "incremental"])
def test_on_tokens(norm: str) -> None:
    """``[B, C, S]`` as in older attention blocks."""

    def forward(module: Forward, x: Tensor) -> Tensor:
        tokens = module.norm(module.conv(x).flatten(2))
        return tokens.reshape(x.shape)

    layers = {"conv": nn.Conv2d(8, 8, 3, padding=1), "norm": nn.GroupNorm(2, 8)}
    compiled = compile_small(Forward(forward, **layers), norm=norm)
    program = program_of(compiled)
    assert counts(program.step)["fisedit.group_norm_sites"] == 1 and not program.refusals
    assert_equals_oracle(compiled)


def test_incremental_statistics_are_exact_under_a_full_mask() -> None:
    assert_full_mask_is_dense(compile_small(normed(), norm="incremental"))


def test_one_statistics_slot_for_two_norms_of_one_value() -> None:
    layers: dict[str, nn.Module] = {"conv": nn.Conv2d(8, 8, 3, padding=1)}
    layers |= {"left": nn.GroupNorm(2, 8), "right": nn.GroupNorm(2, 8), "finer": nn.GroupNorm(4, 8)}

    def forward(module: Forward, x: Tensor) -> Tensor:
        x = module.conv(x)
        return module.left(x) + module.right(x) + module.finer(x)

    compiled = compile_small(Forward(forward, **layers))
    kinds = [slot.kind for slot in program_of(compiled).slots]
    assert sorted(kind.groups for kind in kinds if isinstance(kind, Statistics)) == [2, 4]
    assert_equals_oracle(compiled)


def test_a_norm_over_rows_of_the_map_stays_dense_with_a_reason() -> None:
    """Channels last makes the height the norm's channels (fixed by the norm, so no lattice is left at all)."""
    layers = {"conv": nn.Conv2d(8, 8, 3, padding=1), "norm": nn.GroupNorm(1, 8, affine=False)}

    def forward(module: Forward, x: Tensor) -> Tensor:
        pooled = module.norm(module.conv(x).mean(3))
        return x + pooled[..., None]

    compiled = compile_small(Forward(forward, **layers), norm="incremental")
    program = program_of(compiled)
    assert counts(program.step)["aten.group_norm"] == 1
    assert "height" in reasons(program)["aten.group_norm"] or "sites" in reasons(program)["aten.group_norm"]
    assert_full_mask_is_dense(compiled)


@pytest.mark.parametrize("norm", ["recorded", "incremental"])
def test_on_a_map_whose_width_comes_first(norm: str) -> None:
    """Rows follow the map's own order of axes; sums per site would follow the tensor's."""
    layers = {"conv": nn.Conv2d(8, 8, 3, padding=1), "norm": nn.GroupNorm(2, 8)}
    compiled = compile_small(
        Forward(lambda m, x: m.norm(m.conv(x).transpose(2, 3)).transpose(2, 3), **layers), norm=norm
    )
    assert any("width comes before height" in reason for reason in reasons(program_of(compiled)).values())
    assert_full_mask_is_dense(compiled)


@pytest.mark.parametrize("norm", ["recorded", "incremental"])
def test_many_norms_of_one_value_have_statistics_each(norm: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        values = [functional.silu(functional.group_norm(y, groups)) for groups in GROUPS]
        return m.out(values[0] + values[1] + values[2] + values[3])

    convs = {name: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for name in ("conv", "out")}
    compiled = compile_small(Forward(forward, **convs), norm=norm)
    assert_equals_oracle(compiled)
    kinds = [slot.kind.name for slot in program_of(compiled).slots]
    assert kinds.count("statistics") == len(GROUPS)
