"""Views and permutations mostly vanish on rows; those that cut or merge sites stay dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.pass_tools import (
    Forward,
    assert_equals_oracle,
    assert_full_mask_is_dense,
    compile_small,
    counts,
    program_of,
)

Function = Callable[[Any, Tensor], Tensor]
MOVES = ("aten.permute", "aten.transpose.int", "aten.view", "aten.reshape", "aten.unsqueeze", "aten.squeeze.dim")


def module_of(function: Function) -> Forward:
    return Forward(
        lambda m, x: m.back(F.silu(function(m, m.conv(x)))),
        conv=nn.Conv2d(8, 8, 3, padding=1),
        back=nn.Conv2d(8, 8, 3, padding=1),
    )


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2),
        lambda m, x: F.relu(x.permute(0, 2, 3, 1).flatten(1, 2)).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2),
        lambda m, x: F.relu(x.flatten(2)).reshape(x.shape),
        lambda m, x: F.relu(x.flatten(2).transpose(1, 2).unflatten(2, (2, 4))).flatten(2).mT.reshape(x.shape),
        lambda m, x: (
            F.relu(x.flatten(2).mT.unflatten(2, (2, 4)).transpose(1, 2)).transpose(1, 2).flatten(2).mT.reshape(x.shape)
        ),
        lambda m, x: F.relu(x.movedim(1, -1)).movedim((-1, 0), (1, 0)).swapaxes(2, 3).swapdims(2, 3),
        lambda m, x: F.relu(x.unsqueeze(1)).squeeze(1),
        lambda m, x: F.relu(x.unsqueeze(-1)).squeeze(-1),
        lambda m, x: F.relu(x.view(x.shape[0], 2, 4, *x.shape[2:])).transpose(1, 2).reshape(x.shape),
        lambda m, x: F.relu(x.flatten(2).unsqueeze(2)).squeeze(2).view(x.shape),
    ],
    ids=[
        "channels last",
        "tokens",
        "flat",
        "heads",
        "heads first",
        "other spellings",
        "unsqueeze",
        "unsqueeze last",
        "groups",
        "flat unsqueezed",
    ],
)
def test_moves_of_axes_keep_rows(function: Function) -> None:
    compiled = compile_small(module_of(function))
    program = program_of(compiled)
    assert not program.refusals
    assert counts(program.step)["fisedit.gather_sites"] == 1
    assert_equals_oracle(compiled)
    assert_full_mask_is_dense(compiled)


def test_moves_between_maps_and_tokens_vanish() -> None:
    """Maps and tokens of one level have the same rows."""

    def forward(module: Any, x: Tensor) -> Tensor:
        tokens = module.conv(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 8)
        return F.relu(tokens).reshape(x.shape[0], *x.shape[2:], 8).permute(0, 3, 1, 2)

    def moves(graph: Any) -> int:
        return sum(counts(graph)[name] for name in MOVES)

    bare = compile_small(Forward(lambda m, x: F.relu(m.conv(x)), conv=nn.Conv2d(8, 8, 3, padding=1)))
    compiled = compile_small(Forward(forward, conv=nn.Conv2d(8, 8, 3, padding=1)))
    assert moves(program_of(compiled).recording) > moves(program_of(bare).recording)
    assert moves(program_of(compiled).step) == moves(program_of(bare).step)
    assert_equals_oracle(compiled)


def windows(x: Tensor) -> Tensor:
    """``[B, C, H, W]`` to windows of 2x2 sites, ``[B, H/2, W/2, 4, C]``."""
    batch, channels, height, width = x.shape
    cut = x.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, height // 2, width // 2, 4, channels)


def from_windows(cut: Tensor, x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    parts = cut.reshape(batch, height // 2, width // 2, 2, 2, channels)
    return parts.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: from_windows(windows(x).softmax(3), x),
        lambda m, x: x + F.pixel_shuffle(F.avg_pool2d(x, 2).repeat(1, 4, 1, 1), 2),
        lambda m, x: F.pixel_shuffle(F.pixel_unshuffle(x, 2).tanh(), 2),
        lambda m, x: (
            F.relu(x.permute(0, 2, 3, 1).reshape(-1, 8)).reshape(x.shape[0], *x.shape[2:], 8).permute(0, 3, 1, 2)
        ),
        lambda m, x: F.relu(x.transpose(2, 3).flatten(2)).unflatten(2, (x.shape[3], x.shape[2])).transpose(2, 3),
    ],
    ids=["windows", "pixel_shuffle", "pixel_unshuffle", "batch merged", "columns first"],
)
def test_cuts_and_merges_of_sites_stay_dense_with_reasons(function: Function) -> None:
    compiled = compile_small(module_of(function), multiple=2)
    program = program_of(compiled)
    assert program.refusals
    for node, _path, _operation, reason in program.refusals:
        assert len(reason.split()) >= 3, f"{node}: {reason!r} does not tell a user much"
    assert_full_mask_is_dense(compiled)
    assert_equals_oracle(
        compiled,
        {"reshape", "softmax", "avg_pool2d", "pixel_shuffle", "pixel_unshuffle", "tanh", "permute", "transpose"},
    )


def grid_of_strides(m: Any, x: Tensor) -> Tensor:
    """As in MaxViT: axes as long as half a map's, which hold every second half of it."""
    batch, channels, height, width = x.shape
    grid = x.view(batch, channels, 2, height // 2, 2, width // 2).permute(0, 2, 4, 3, 5, 1).contiguous()
    return (grid.tanh() + grid.sin()).permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


def samples_between_sites(m: Any, x: Tensor) -> Tensor:
    """Tokens whose axis holds other tokens' samples, and back."""
    batch, channels = x.shape[:2]
    tokens = x.flatten(2).permute(2, 0, 1).reshape(-1, channels).reshape(batch, -1, channels)
    return (tokens.tanh() + tokens.sin()).reshape(-1, batch, channels).permute(1, 2, 0).reshape(x.shape)


@pytest.mark.parametrize("function", [grid_of_strides, samples_between_sites])
def test_sites_of_elsewhere_are_not_taken_for_a_levels(function: Function) -> None:
    compiled = compile_small(module_of(function), multiple=2)
    assert any("hold sites of elsewhere" in reason for *_, reason in program_of(compiled).refusals)
    assert counts(program_of(compiled).step)["fisedit.conv2d_sites"] == 2, "behind the way back they are a map again"
    assert_equals_oracle(compiled)
    assert_full_mask_is_dense(compiled)


def test_squeezing_an_axis_of_several_entries_changes_nothing() -> None:
    compiled = compile_small(module_of(lambda m, x: F.relu(x).squeeze(1)))
    assert not program_of(compiled).refusals
    assert_equals_oracle(compiled)
