"""Pointwise operations run on rows; copies vanish; operands without sites are brought to the rows' axis order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisedit_compiler.passes.rewrites.pointwise import is_pointwise
from tests.support.pass_tools import (
    Forward,
    TextForward,
    assert_equals_oracle,
    assert_full_mask_is_dense,
    compile_small,
    counts,
    program_of,
    reasons,
)

aten = torch.ops.aten


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.silu(x),
        lambda m, x: x * 2 + 1,
        lambda m, x: x.clamp(-1, 1).abs().sqrt(),
        lambda m, x: torch.where(x > 0, x, -x),
        lambda m, x: x.clone().contiguous(memory_format=torch.channels_last) + x,
        lambda m, x: (x.double() * 3).float(),
        lambda m, x: x + m.conv.bias[:, None, None],
        lambda m, x: x * m.conv.bias[None, :, None, None] + torch.ones(1),
        lambda m, x: F.relu(x, inplace=True) + 1,
        lambda m, x: torch.addcmul(x, x, x, value=0.5),
        lambda m, x: torch.lerp(x, F.silu(x), 0.3),
    ],
)
def test_on_rows(function: Callable[[Any, Tensor], Tensor]) -> None:
    compiled = compile_small(Forward(lambda m, x: function(m, m.conv(x)), conv=nn.Conv2d(8, 8, 3, padding=1)))
    program = program_of(compiled)
    after = counts(program.step)
    assert not program.refusals
    assert after["fisedit.gather_sites"] == 1
    assert after["aten.clone"] == after["aten.contiguous"] == 0
    assert_equals_oracle(compiled)
    assert_full_mask_is_dense(compiled)


@pytest.mark.parametrize(
    "operand",
    [
        lambda text: text.mean(1)[:, :, None, None],
        lambda text: text.mean((1, 2)).view(-1, 1, 1, 1),
        lambda text: text.mean((1, 2), keepdim=True)[..., None],
        lambda text: text[:1].mean((0, 1))[:, None, None],
        lambda text: text[0].mean(),
    ],
    ids=["[B,C,1,1]", "[B,1,1,1]", "[B,1,1,1] again", "[C,1,1]", "scalar"],
)
def test_operands_without_sites_are_hoisted(operand: Callable[[Tensor], Tensor]) -> None:
    compiled = compile_small(
        TextForward(lambda m, x, text: F.silu(m.conv(x) + operand(text)), conv=nn.Conv2d(8, 8, 3, padding=1))
    )
    program = program_of(compiled)
    assert not program.refusals
    assert {"text"} in [bundle.dependences for bundle in program.bundles]
    assert counts(program.step)["aten.mean.dim"] == 0
    assert_equals_oracle(compiled)


def test_an_operand_of_positions_stays_dense_with_a_reason() -> None:
    """A gradient over the map depends on where a site is: it has sites but is one row high."""

    def forward(module: Any, x: Tensor) -> Tensor:
        return module.conv(x) * torch.arange(x.shape[3], dtype=x.dtype, device=x.device)

    compiled = compile_small(Forward(forward, conv=nn.Conv2d(8, 8, 3, padding=1)))
    program = program_of(compiled)
    assert "operand" in reasons(program)["aten.mul.Tensor"]
    assert_equals_oracle(compiled)
    assert_full_mask_is_dense(compiled)


def test_an_operand_with_every_position_is_packed() -> None:
    """A full map of positions is gathered like any other."""

    def forward(module: Any, x: Tensor) -> Tensor:
        columns = torch.arange(x.shape[3], dtype=x.dtype, device=x.device)
        return module.conv(x) * columns.expand(x.shape)

    compiled = compile_small(Forward(forward, conv=nn.Conv2d(8, 8, 3, padding=1)))
    assert not program_of(compiled).refusals
    assert_equals_oracle(compiled)


def test_what_counts_as_pointwise() -> None:
    assert is_pointwise(aten.add.Tensor) and is_pointwise(aten.clone.default) and is_pointwise(aten.to.dtype)
    assert not is_pointwise(aten.add_.Tensor), "a write is no value"
    assert not is_pointwise(aten.softmax.int) and not is_pointwise(aten.cumsum.default)
    assert not is_pointwise(torch.add)


def test_a_map_of_fewer_axes_is_not_spread_over_rows() -> None:
    module = Forward(lambda m, x: m.conv(x) + m.conv(x).mean((0, 1)), conv=nn.Conv2d(8, 8, 3, padding=1))
    compiled = compile_small(module)
    assert any("fewer axes" in reason for reason in reasons(program_of(compiled)).values())
    assert_full_mask_is_dense(compiled)
