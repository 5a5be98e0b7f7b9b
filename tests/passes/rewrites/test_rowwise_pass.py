"""Operations that mix the channels of one site run on rows; over sites they stay dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def layers() -> dict[str, nn.Module]:
    return {
        "conv": nn.Conv2d(8, 8, 3, padding=1),
        "linear": nn.Linear(8, 8),
        "norm": nn.LayerNorm(8),
        "rms": nn.RMSNorm(8),
    }


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def as_map(t: Tensor, x: Tensor) -> Tensor:
    return t.transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize(
    ("function", "operation"),
    [
        (lambda m, x: as_map(m.linear(tokens(x)), x), "aten.linear"),
        (lambda m, x: as_map(m.norm(tokens(x)), x), "aten.layer_norm"),
        (lambda m, x: m.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), "aten.layer_norm"),
        (lambda m, x: m.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), "aten.linear"),
        (lambda m, x: m.rms(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), "aten.rms_norm"),
        (lambda m, x: as_map(tokens(x) @ m.linear.weight, x), "aten.matmul"),
    ],
    ids=["linear", "layer_norm", "layer_norm of a map", "linear of a map", "rms_norm", "matmul"],
)
def test_on_rows(function: Callable[[Any, Tensor], Tensor], operation: str) -> None:
    compiled = compile_small(Forward(lambda m, x: function(m, m.conv(x)), **layers()))
    program = program_of(compiled)
    after = counts(program.step)
    assert not program.refusals
    assert after[operation] == program.operations[operation] == 1
    assert after["fisedit.gather_sites"] == 1
    assert_equals_oracle(compiled)
    assert_full_mask_is_dense(compiled)


def test_a_product_with_the_text() -> None:
    """``[B, S, C] @ [B, C, T]``, attention over words written out."""

    def forward(module: Any, x: Tensor, text: Tensor) -> Tensor:
        flat = tokens(module.conv(x))
        weights = torch.softmax(torch.bmm(flat, text.transpose(1, 2)), -1)
        return as_map(torch.bmm(weights, text), x)

    compiled = compile_small(TextForward(forward, **layers()))
    assert not program_of(compiled).refusals
    assert_equals_oracle(compiled)


@pytest.mark.parametrize(
    ("function", "operation"),
    [
        (lambda m, x: x + F.layer_norm(x, x.shape[1:]), "aten.layer_norm"),
        (lambda m, x: x + (tokens(x).transpose(1, 2) @ tokens(x)).mean((1, 2))[:, None, None, None], "aten.matmul"),
    ],
    ids=["layer_norm over sites", "products of sites"],
)
def test_over_sites_stays_dense_with_a_reason(function: Callable[[Any, Tensor], Tensor], operation: str) -> None:
    compiled = compile_small(Forward(lambda m, x: function(m, m.conv(x)), **layers()))
    program = program_of(compiled)
    assert counts(program.step)[operation] == 1
    assert reasons(program)[operation]
    assert_equals_oracle(compiled, {"layer_norm", "flatten"})
    assert_full_mask_is_dense(compiled)
