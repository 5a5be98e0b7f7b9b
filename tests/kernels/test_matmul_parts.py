"""``matmul_parts`` and ``sum_parts`` against one product in float64, and into how many parts a product is cut."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fisedit_compiler.kernels.matmul_parts import choose_parts, matmul_parts, sum_parts
from fisedit_compiler.kernels.registry import KernelError
from fisedit_compiler.kernels.tolerances import assert_close
from tests.kernels.tables import strided

HALVES = (torch.float16, torch.bfloat16)
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.t().contiguous().t(),
    "strided": strided,
    "cut out": lambda tensor: F.pad(tensor, (2, 3, 1, 1), value=float("nan"))[1:-1, 2:-3],
}


def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The whole product in float64."""
    total = rows.double() @ weight.double().t()
    return total if bias is None else total + bias.double()


@given(
    count=st.integers(0, 20),
    outputs=st.integers(1, 20),
    parts=st.integers(1, 8),
    inner=st.integers(1, 9),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_parts_add_up(count: int, outputs: int, parts: int, inner: int, biased: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, weight = (torch.randn(n, parts * inner, generator=generator) for n in (count, outputs))
    bias = torch.randn(outputs, generator=generator) if biased else None
    products = matmul_parts(rows, weight, parts)
    assert products.shape == (parts, count, outputs) and products.is_contiguous()
    for index, part in enumerate(products):
        inputs = slice(index * inner, (index + 1) * inner)
        assert_close(part, product(rows[:, inputs], weight[:, inputs], None), torch.float32)
    assert_close(sum_parts(products, bias), product(rows, weight, bias), torch.float32)


@pytest.mark.parametrize("weight_form", FORMS)
@pytest.mark.parametrize("rows_form", FORMS)
def test_any_strides(rows_form: str, weight_form: str, dtype: torch.dtype) -> None:
    rows, weight, bias = torch.randn(5, 24).to(dtype), torch.randn(7, 24).to(dtype), torch.randn(7).to(dtype)
    products = matmul_parts(FORMS[rows_form](rows), FORMS[weight_form](weight), 3)
    assert products.dtype == dtype and products.is_contiguous()
    total = sum_parts(products, bias)
    assert total.dtype == dtype
    assert_close(total, product(rows, weight, bias), dtype)


def check_half(count: int, inputs: int, outputs: int, parts: int, dtype: torch.dtype, device: str) -> None:
    """Root mean square errors against float64: parts rounded one by one cost at most as much again as one product."""
    generator = torch.Generator().manual_seed(inputs)
    shapes = ((count, inputs), (outputs, inputs), (outputs,))
    rows, weight, bias = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    for summand in (None, bias):
        expected = product(rows, weight, summand)
        in_parts = (sum_parts(matmul_parts(rows, weight, parts), summand).double() - expected).norm()
        whole = (F.linear(rows, weight, summand).double() - expected).norm()
        assert 0 < in_parts <= 2 * whole, f"in parts {in_parts:.3e}, whole {whole:.3e}"


SHAPES = ((1, 1280, 320, 2), (33, 640, 64, 5), (16, 2560, 1280, 4), (70, 5760, 640, 6), (5, 960, 70, 15))
"""Rows, inputs, outputs, parts."""


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_half_precision_costs_at_most_twice_the_error(shape: tuple[int, int, int, int], half: torch.dtype) -> None:
    check_half(*shape, half, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_half_precision_on_a_gpu(shape: tuple[int, int, int, int], half: torch.dtype) -> None:
    check_half(*shape, half, "cuda")


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_parts_are_added_in_float32(half: torch.dtype) -> None:
    """Added in half precision, the small parts would vanish beside the large ones."""
    parts = torch.tensor([4096.0, 1.0, 1.0, 1.0, -4096.0], dtype=half)[:, None, None]
    assert sum_parts(parts, torch.tensor([0.25], dtype=half)).item() == 3.25


@pytest.mark.parametrize("leading", [(), (4,), (2, 4), (2, 0)], ids=str)
def test_parts_of_any_rank_are_added(leading: tuple[int, ...]) -> None:
    parts, bias = torch.randn(3, *leading, 5), torch.randn(5)
    assert_close(sum_parts(parts, bias), parts.double().sum(0) + bias.double(), torch.float32)
    assert torch.equal(sum_parts(parts[:1], None), parts[0]), "one part is the sum"


@pytest.mark.parametrize("parts", [5, 48, 0, -2])
def test_parts_that_are_no_divisor_are_refused(parts: int) -> None:
    with pytest.raises(KernelError, match=f"24 inputs, the weight 24: not {parts} equal parts"):
        matmul_parts(torch.randn(3, 24), torch.randn(7, 24), parts)


def test_operands_that_do_not_fit_are_refused() -> None:
    with pytest.raises(KernelError, match="rows have 24 inputs, the weight 12"):
        matmul_parts(torch.randn(3, 24), torch.randn(7, 12), 2)
    with pytest.raises(KernelError, match="got 3 and 2 dimensions"):
        matmul_parts(torch.randn(2, 3, 24), torch.randn(7, 24), 2)
    with pytest.raises(KernelError, match="got 2 and 4 dimensions"):
        matmul_parts(torch.randn(3, 24), torch.randn(7, 24, 1, 1), 2)


# -- into how many parts ---------------------------------------------------------------------------


@given(inputs=st.one_of(st.integers(1, 20000), st.integers(1, 300).map(lambda n: 64 * n)), outputs=st.integers(1, 3000))
def test_parts_are_equal_aligned_and_large(inputs: int, outputs: int) -> None:
    parts = choose_parts(inputs, outputs)
    assert parts >= 1
    if parts > 1:
        assert inputs % parts == 0 and (inputs // parts) % 64 == 0, "what a GEMM loads at a time"
        assert inputs // parts >= 640
        assert 64 <= outputs <= 1280


@given(inputs=st.integers(1, 300).map(lambda n: 64 * n))
def test_narrow_and_wide_products_stay_whole(inputs: int) -> None:
    for outputs in (1, 4, 63, 1281, 1920, 10240):
        assert choose_parts(inputs, outputs) == 1


@pytest.mark.parametrize(
    ("inputs", "outputs", "parts"),
    [
        (5120, 1280, 4), (11520, 1280, 4), (17280, 1280, 3), (5760, 640, 6), (2560, 640, 4), (1280, 1280, 2),
        (640, 640, 1), (1280, 640, 2), (1280, 10240, 1), (2880, 4, 1),
        (2880, 320, 3),  # 4 parts of 720 would be no multiples of 64
        (1279, 640, 1),  # a prime
    ],
)  # fmt: skip
def test_choices_for_the_products_of_stable_diffusion(inputs: int, outputs: int, parts: int) -> None:
    assert choose_parts(inputs, outputs) == parts
