"""Linear layers that read the same rows become one, with a hoisted weight."""

from __future__ import annotations

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
)


def siblings(bias: tuple[bool, ...], widths: tuple[int, ...]) -> Forward:
    """``conv`` and, on its tokens, one linear layer per entry; their results add up on the narrowest."""

    def forward(module: Forward, x: Tensor) -> Tensor:
        tokens = module.conv(x).flatten(2).transpose(1, 2)
        parts = [getattr(module, f"linear{index}")(tokens)[..., :8] for index in range(len(widths))]
        return (parts[0] * parts[1] + sum(parts[2:])).transpose(1, 2).reshape(x.shape)

    layers: dict[str, nn.Module] = {"conv": nn.Conv2d(8, 8, 3, padding=1)}
    for index, (biased, width) in enumerate(zip(bias, widths, strict=True)):
        layers[f"linear{index}"] = nn.Linear(8, width, bias=biased)
    return Forward(forward, **layers)


@pytest.mark.parametrize("bias", [True, False])
def test_siblings_become_one(bias: bool) -> None:
    compiled = compile_small(siblings((bias,) * 3, (8, 16, 12)))
    program = program_of(compiled)
    after = counts(program.step)
    assert program.operations["aten.linear"] == 3
    assert after["aten.linear"] == 1 and after["aten.split_with_sizes"] == 1
    assert after["aten.cat"] == 0, "the joined weight is hoisted"
    (weights,) = (bundle for bundle in program.bundles if not bundle.dependences)
    assert counts(weights.graph)["aten.cat"] == 1 + bias
    assert_equals_oracle(compiled)
    assert_full_mask_is_dense(compiled)


def test_layers_with_and_without_bias_stay_apart() -> None:
    compiled = compile_small(siblings((True, False, True), (8, 8, 8)))
    assert counts(program_of(compiled).step)["aten.linear"] == 2
    assert_equals_oracle(compiled)


def test_an_only_child_and_a_disabled_pass_are_left_alone() -> None:
    compiled = compile_small(siblings((True,) * 3, (8, 8, 8)), disabled_passes={"merge_linears"})
    assert counts(program_of(compiled).step)["aten.linear"] == 3
    assert_equals_oracle(compiled)


def test_a_matrix_that_depends_on_its_siblings_result_is_left_alone() -> None:
    def forward(module: Forward, x: Tensor) -> Tensor:
        tokens = module.conv(x).flatten(2).transpose(1, 2)
        matrix = module.linear(tokens).mean((0, 1)).outer(torch.ones(8))
        return (tokens + F.linear(tokens, matrix, module.linear.bias)).transpose(1, 2).reshape(x.shape)

    compiled = compile_small(Forward(forward, conv=nn.Conv2d(8, 8, 3, padding=1), linear=nn.Linear(8, 8)))
    assert counts(program_of(compiled).step)["aten.split_with_sizes"] == 0
    assert_full_mask_is_dense(compiled)
