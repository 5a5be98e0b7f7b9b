"""``conv2d`` becomes ``conv2d_sites``, or a linear layer where it reads no neighbour."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from torch import nn

from tests.support.pass_tools import (
    Forward,
    assert_equals_oracle,
    assert_full_mask_is_dense,
    compile_small,
    counts,
    program_of,
    reasons,
)


def conv(**options: object) -> Forward:
    return Forward(lambda m, x: m.conv(x), conv=nn.Conv2d(8, 8, **options))  # type: ignore[arg-type]


def test_three_by_three() -> None:
    compiled = compile_small(conv(kernel_size=3, padding=1))
    program = program_of(compiled)
    assert program.operations["aten.conv2d"] == 1
    after = counts(program.step)
    assert after["aten.conv2d"] == 0 and after["fisedit.conv2d_sites"] == 1
    assert after["fisedit.gather_sites"] == after["fisedit.scatter_sites"] == 1
    assert [slot.name for slot in program.slots] == ["conv.input", "conv.output"]
    assert not program.refusals
    assert_equals_oracle(compiled)
    assert_full_mask_is_dense(compiled)


def test_the_packed_weight_is_hoisted() -> None:
    program = program_of(compile_small(conv(kernel_size=3, padding=1)))
    (bundle,) = program.bundles
    assert bundle.name == "weights" and counts(bundle.graph) == {"fisedit.pack_conv_weight": 1}


def test_one_by_one_is_a_linear_layer_and_records_no_input() -> None:
    compiled = compile_small(conv(kernel_size=1))
    program = program_of(compiled)
    after = counts(program.step)
    assert after["aten.linear"] == 1 and after["fisedit.conv2d_sites"] == after["aten.conv2d"] == 0
    assert [slot.name for slot in program.slots] == ["conv.output"]
    assert not program.convs
    assert_equals_oracle(compiled)


@pytest.mark.parametrize(
    ("options", "multiple"),
    [
        ({"kernel_size": 3, "stride": 2, "padding": 1}, 2),
        ({"kernel_size": 1, "stride": 2}, 2),
        ({"kernel_size": 2, "stride": 2}, 2),
        ({"kernel_size": 5, "padding": 2, "bias": False}, 1),
        ({"kernel_size": 3, "padding": 2, "dilation": 2}, 1),
        ({"kernel_size": (1, 3), "padding": (0, 1)}, 1),
        ({"kernel_size": 4, "stride": 4}, 4),
    ],
    ids=str,
)
def test_every_geometry_is_an_index_table(options: dict[str, object], multiple: int) -> None:
    compiled = compile_small(conv(**options), multiple)
    program = program_of(compiled)
    assert counts(program.step)["fisedit.conv2d_sites"] == 1 and not program.refusals
    assert len(program.convs) == 1
    assert_equals_oracle(compiled)


def test_padding_by_name() -> None:
    compiled = compile_small(conv(kernel_size=3, padding="same"))
    assert_equals_oracle(compiled, () if not program_of(compiled).refusals else {"conv2d"})


@pytest.mark.parametrize("factor", [2, 3])
def test_upsampling_in_front_is_swallowed(factor: int) -> None:
    """The recorded canvas is the coarse one, and no upsampling is left."""
    module = Forward(
        lambda m, x: m.conv(F.interpolate(m.first(x), scale_factor=float(factor), mode="nearest")),
        first=nn.Conv2d(8, 8, 3, padding=1),
        conv=nn.Conv2d(8, 8, 3, padding=1),
    )
    compiled = compile_small(module)
    program = program_of(compiled)
    assert program.operations["aten.upsample_nearest2d.vec"] == 1
    after = counts(program.step)
    assert after["fisedit.conv2d_sites"] == 2 and after["fisedit.gather_sites"] == 1
    assert not [name for name in after if "upsample" in name]
    (coarse,) = (slot for slot in program.slots if slot.name == "conv.input")
    assert coarse.layout.level == 1
    assert_equals_oracle(compiled)


def test_shared_input_is_recorded_once() -> None:
    layers = {name: nn.Conv2d(8, 8, 3, padding=1) for name in ("left", "right")}
    compiled = compile_small(Forward(lambda m, x: m.left(x) + m.right(x), **layers))
    program = program_of(compiled)
    assert [slot.kind.name for slot in program.slots].count("canvas") == 1
    assert counts(program.step)["fisedit.gather_sites"] == 1
    assert_equals_oracle(compiled)


def test_grouped_convolution_stays_dense_with_a_reason() -> None:
    compiled = compile_small(
        Forward(
            lambda m, x: m.grouped(m.conv(x)),
            conv=nn.Conv2d(8, 8, 3, padding=1),
            grouped=nn.Conv2d(8, 8, 3, padding=1, groups=4),
        )
    )
    program = program_of(compiled)
    after = counts(program.step)
    assert after["aten.conv2d"] == after["fisedit.conv2d_sites"] == 1
    assert "groups=4" in reasons(program)["aten.conv2d"]
    assert_equals_oracle(compiled, {"conv2d"})
    assert_full_mask_is_dense(compiled)


def test_a_border_that_leaves_the_lattice_stays_dense() -> None:
    """A circular border makes a map of ``H + 2`` by ``W + 2``, which is no level."""
    compiled = compile_small(conv(kernel_size=3, padding=1, padding_mode="circular"))
    program = program_of(compiled)
    assert counts(program.step)["aten.conv2d"] == 1
    assert program.refusals and all(reason for *_, reason in program.refusals)
    assert_equals_oracle(compiled, {"pad"})
