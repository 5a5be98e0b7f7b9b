"""Concatenation, splits, slices and reductions along channels; along sites they stay dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.pass_tools import (
    Forward,
    assert_equals_oracle,
    assert_full_mask_is_dense,
    compile_small,
    counts,
    program_of,
    reasons,
)

Function = Callable[[Any, Tensor], Tensor]


def after_conv(function: Function, channels: int = 8) -> Forward:
    """``function(module, conv(x))``, brought back to eight channels by a 1x1 convolution."""
    return Forward(
        lambda m, x: m.back(function(m, m.conv(x))),
        conv=nn.Conv2d(8, 8, 3, padding=1),
        back=nn.Conv2d(channels, 8, 1),
    )


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def as_map(t: Tensor, x: Tensor) -> Tensor:
    return t.transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:])


@pytest.mark.parametrize(
    ("function", "channels", "operation"),
    [
        (lambda m, x: torch.cat([x, x * 2, F.silu(x)], 1), 24, "aten.cat"),
        (lambda m, x: as_map(torch.cat([tokens(x), tokens(x) + 1], -1), x), 16, "aten.cat"),
        (lambda m, x: (lambda a, b: a * F.gelu(b))(*x.chunk(2, 1)), 4, "aten.chunk"),
        (lambda m, x: as_map((lambda a, b: a * b)(*tokens(x).chunk(2, -1)), x), 4, "aten.chunk"),
        (lambda m, x: (lambda a, b, c: b + c[:, :3] + a[:, :1])(*x.split([2, 3, 3], 1)), 3, "aten.split_with_sizes"),
        (lambda m, x: x[:, 2:6], 4, "aten.slice.Tensor"),
        (lambda m, x: x[:, 3][:, None] + x[:, :2], 2, "aten.select.int"),
        (lambda m, x: torch.softmax(x, 1), 8, "aten.softmax.int"),
        (lambda m, x: x - x.mean(1, keepdim=True), 8, "aten.mean.dim"),
        (lambda m, x: as_map(F.glu(tokens(x), -1), x), 4, "aten.glu"),
        (lambda m, x: x / (1 + x.abs().amax(1, keepdim=True)), 8, "aten.amax"),
    ],
    ids=[
        "cat maps",
        "cat tokens",
        "chunk",
        "chunk tokens",
        "split",
        "slice",
        "select",
        "softmax",
        "mean",
        "glu",
        "amax",
    ],
)
def test_along_channels(function: Function, channels: int, operation: str) -> None:
    compiled = compile_small(after_conv(function, channels))
    program = program_of(compiled)
    assert program.operations[operation] >= 1
    assert not program.refusals
    assert counts(program.step)["fisedit.gather_sites"] == 1, "everything between input and output is on rows"
    assert_equals_oracle(compiled)
    assert_full_mask_is_dense(compiled)


@pytest.mark.parametrize(
    ("function", "operation", "word"),
    [
        (lambda m, x: x + torch.cat([x, x], 2)[:, :, : x.shape[2]], "aten.cat", "height is scaled by"),
        (lambda m, x: x + torch.softmax(x, 3), "aten.softmax.int", "over a site axis"),
        (lambda m, x: x + x.mean((2, 3), keepdim=True), "aten.mean.dim", "aten.mean"),
        (lambda m, x: x + torch.cumsum(x, 2), "aten.cumsum", "no rule for aten.cumsum"),
        (lambda m, x: x.flip(3), "aten.flip", "no rule for aten.flip"),
        (lambda m, x: x + torch.roll(x, 1, 2), "aten.roll", "no rule for aten.roll"),
    ],
    ids=["cat", "softmax", "mean", "cumsum", "flip", "roll"],
)
def test_along_sites_stays_dense_with_a_reason(function: Function, operation: str, word: str) -> None:
    compiled = compile_small(after_conv(function), norm="incremental")
    program = program_of(compiled)
    assert word in reasons(program)[operation]
    assert_equals_oracle(compiled, {"cat", "softmax", "mean", "cumsum", "flip", "roll", "__getitem__"})
    assert_full_mask_is_dense(compiled)
