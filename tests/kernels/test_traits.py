"""What ops say of themselves: FLOPs that torch counts too, references to inline, arguments that exist."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor

from fisedit_compiler.graph.sizes import in_blocks, row_symbol
from fisedit_compiler.graph.specs import ValueSpec, nbytes
from fisedit_compiler.kernels.aten import ATEN
from fisedit_compiler.kernels.registry import registered_ops
from fisedit_compiler.kernels.traits import TRAITS, OpTraits, inlined, no_products, nothing_moved, traits_of
from tests.kernels.arguments import op_arguments
from tests.support.flops import counted

aten = torch.ops.aten
OPS = sorted(registered_ops())
ROWS = 5
SYMBOLS = {row_symbol(Fraction(1)): ROWS, in_blocks(row_symbol(Fraction(1))): ROWS}


@pytest.fixture
def others() -> Iterator[dict[Any, OpTraits]]:
    """Traits that other packages register, forgotten after the test."""
    before = dict(TRAITS)
    yield TRAITS
    TRAITS.clear()
    TRAITS.update(before)


def spec(value: Any) -> Any:
    """As a graph has it: the number of rows is a symbol."""
    if isinstance(value, tuple):
        return tuple(map(spec, value))
    if not isinstance(value, Tensor):
        return value
    sizes = (row_symbol(Fraction(1)) if size == ROWS else sympy.Integer(size) for size in value.shape)
    return ValueSpec(tuple(sizes), value.dtype)


def described(name: str) -> tuple[list[Any], Any]:
    op, arguments = registered_ops()[name], op_arguments(ROWS)[name]
    return [spec(argument) for argument in arguments], spec(op(*arguments))


@pytest.mark.parametrize("name", OPS)
def test_every_op_says_its_flops_which_are_those_torch_counts(name: str) -> None:
    op = registered_ops()[name]
    assert traits_of(op.overload) is op.traits
    assert op.traits.flops is not None, f"{name} has no FLOPs among its traits; no_products if it has none"
    flops = sympy.sympify(op.traits.flops(*described(name))).subs(SYMBOLS)
    assert flops == counted(lambda: op.reference(*op_arguments(ROWS)[name]))


@pytest.mark.parametrize("name", [name for name in OPS if registered_ops()[name].traits.bytes])
def test_bytes_of_an_op_that_says_them_are_no_more_than_all_operands(name: str) -> None:
    arguments, out = described(name)
    formula = registered_ops()[name].traits.bytes
    assert formula is not None
    everything = sum(nbytes(value) for value in (*arguments, out) if isinstance(value, ValueSpec))
    assert 0 < formula(arguments, out).subs(SYMBOLS) < everything.subs(SYMBOLS)


def test_what_inductor_takes_apart_becomes_its_reference() -> None:
    found = {op.name for op in registered_ops().values() if op.overload in inlined()}
    assert found == {
        "conv2d_sites",
        "gather_sites",
        "group_norm_row_sums",
        "group_norm_site_sums",
        "group_norm_sites",
        "group_norm_statistics",
        "recentre_site_sums",
        "scatter_sites",
        "update_statistics",
    }
    others = {
        op.name for op in registered_ops().values() if op.name in found and inlined()[op.overload] != op.reference
    }
    assert others == {"group_norm_statistics"}, "in one pass, as the norm beside it; see below"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_statistics_are_taken_apart_into_what_they_are(dtype: torch.dtype) -> None:
    (op,) = (op for op in registered_ops().values() if op.name == "group_norm_statistics")
    x = (torch.randn(2, 12, 7, 5, generator=torch.Generator().manual_seed(0)) * 3 + 50).to(dtype)
    found = inlined()[op.overload](x, 4)
    torch.testing.assert_close(found, op.reference(x, 4), rtol=1e-5, atol=1e-6)
    assert found.dtype == torch.float32 and found.is_contiguous()


@pytest.mark.parametrize("name", [name for name in OPS if registered_ops()[name].traits.updates])
def test_what_an_op_updates_are_tensors_it_reads(name: str) -> None:
    arguments = op_arguments(ROWS)[name]
    for update in registered_ops()[name].traits.updates:
        assert isinstance(arguments[update.recorded], Tensor)
        assert update.new is None or isinstance(arguments[update.new], Tensor)


@pytest.mark.parametrize(
    ("operation", "flops", "bytes"),
    [
        (aten.silu.default, no_products, None),
        (aten.unsqueeze.default, no_products, nothing_moved),
        (aten.cumsum.default, None, None),
        (torch.sym_max, None, None),
    ],
    ids=lambda value: str(getattr(value, "__name__", value)),
)
def test_what_nobody_describes_is_told_by_its_schema_and_tags(operation: Any, flops: Any, bytes: Any) -> None:
    assert operation not in ATEN
    assert traits_of(operation) == OpTraits(flops=flops, bytes=bytes)


def test_torchs_own_operations_have_one_row_each() -> None:
    assert traits_of(aten.linear.default) is ATEN[aten.linear.default]
    assert not any(operation.namespace == "fisedit" for operation in ATEN if hasattr(operation, "namespace"))


def test_what_another_package_says_comes_first(others: dict[Any, OpTraits]) -> None:
    softmax = aten.softmax.int
    others[softmax] = replace(traits_of(softmax), inline=torch.softmax)
    assert traits_of(softmax).inline is torch.softmax and traits_of(softmax).flops is no_products
    assert inlined()[softmax] is torch.softmax
