"""What Inductor takes apart: ops that can be, where no provider takes their operands."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fisedit_compiler.kernels.providers import Provider
from fisedit_compiler.kernels.registry import define_op
from fisedit_compiler.kernels.traits import OpTraits, no_products
from fisedit_compiler.lowering.codegen.inductor import taken_apart


def doubled(x: Tensor) -> Tensor:
    return x + x


OP = define_op(
    "fisedit_tests_taken_apart::double(Tensor x) -> Tensor",
    doubled,
    torch.empty_like,
    traits=OpTraits(flops=no_products, inline=doubled),
    providers=[Provider("halves", "CPU", doubled, lambda x: x.dtype is torch.float16 or "not halves")],
)


@pytest.mark.parametrize(("dtype", "whole"), [(torch.float16, True), (torch.float32, False)], ids=str)
def test_an_op_stays_whole_where_a_provider_takes_its_operands(dtype: torch.dtype, whole: bool) -> None:
    traced = make_fx(OP.overload, decomposition_table=taken_apart())(torch.ones(3, dtype=dtype))
    assert any(node.target is OP.overload for node in traced.graph.nodes) is whole
