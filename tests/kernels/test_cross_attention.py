"""Attention to keys without sites: the op and its Triton kernel against a softmax written out in float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from fisedit_compiler.kernels.cross_attention import cross_attention
from fisedit_compiler.kernels.registry import KernelError
from fisedit_compiler.kernels.tolerances import assert_close
from tests.kernels.tables import strided
from tests.kernels.triton_tools import poisoned, run_in_the_interpreter

# batch, heads, queries, keys, size of a head
FEW_KEYS = (
    (1, 1, 1, 1, 16),
    (2, 3, 7, 77, 40),
    (1, 2, 65, 128, 64),
    (2, 1, 33, 77, 80),
    (1, 2, 17, 126, 160),
    (3, 2, 16, 5, 33),
    (1, 3, 49, 1, 7),
    (2, 2, 0, 77, 8),
)
MANY_KEYS = ((2, 2, 7, 129, 40), (1, 1, 33, 300, 64), (1, 2, 0, 200, 16))
FORMS = ("contiguous", "projected", "strided", "shared", "cut out", "mixed")
CONFIGS = ((16, 4), (32, 4), (64, 4))
KERNEL_CASES = (*((form, None) for form in FORMS), *(("projected", config) for config in CONFIGS))
HALVES = (torch.float16, torch.bfloat16)


def written_out(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """``softmax(scale * query @ key.T) @ value`` in float64, on the CPU."""
    query, key, value = (tensor.cpu().double() for tensor in (query, key, value))
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    weights = (factor * torch.einsum("bhnd,bhtd->bhnt", query, key)).exp()
    return torch.einsum("bhnt,bhtd->bhnd", weights / weights.sum(-1, keepdim=True), value)


def operands(
    shape: tuple[int, ...], form: str, dtype: torch.dtype, device: str = "cpu", value_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value in one of the forms, or each in another; what nobody may read is NaN."""
    batch, heads, queries, keys, size = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def tokens(form: str, length: int, size: int, batch: int = batch) -> Tensor:  # [B, h, length, d]
        values = torch.randn(batch, length, heads, size, generator=generator).to(device, dtype)
        if form == "contiguous":
            return values.transpose(1, 2).contiguous()
        if form == "strided":
            return strided(values).transpose(1, 2)
        if form == "cut out":
            around = values.new_full((batch, length + 3, heads + 1, size + 2), float("nan"))
            around[:, 1 : length + 1, 1:, :size] = values
            return around[:, 1 : length + 1, 1:, :size].transpose(1, 2)
        return values.transpose(1, 2)  # as a projection leaves it

    texts = 1 if form == "shared" else batch
    forms = ("contiguous", "projected", "cut out") if form == "mixed" else (form,) * 3
    query = tokens(forms[0], queries, size)
    key, value = tokens(forms[1], keys, size, texts), tokens(forms[2], keys, value_size or size, texts)
    return query, key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1)


def check_op(shape: tuple[int, ...], form: str, dtype: torch.dtype, device: str) -> None:
    given = operands(shape, form, dtype, device)
    for scale in (None, 0.3):
        with poisoned():
            actual = cross_attention(*given, scale)
        assert actual.dtype == dtype and actual.device.type == device
        assert actual.transpose(1, 2).is_contiguous(), "[B, N, h, d] in memory"
        assert_close(actual.cpu(), written_out(*given, scale), dtype)


def check_kernel(
    shape: tuple[int, ...], form: str, config: tuple[int, int] | None, dtype: torch.dtype, device: str
) -> None:
    from fisedit_compiler.kernels.triton.cross_attention import cross_attention as kernel

    given = operands(shape, form, dtype, device)
    for scale in (None, 0.3):
        with poisoned():
            actual = kernel(*given, scale, config=config)
        assert actual.dtype == dtype
        assert actual.transpose(1, 2).is_contiguous(), "[B, N, h, d] in memory"
        assert_close(actual.cpu(), written_out(*given, scale), dtype)


def check_large_logits(dtype: torch.dtype, device: str, kernel: bool) -> None:
    """Their exponentials overflow, their softmax does not."""
    if kernel:
        from fisedit_compiler.kernels.triton.cross_attention import cross_attention as attend
    else:
        attend = cross_attention
    query, key, value = (tensor.sign() for tensor in operands((1, 2, 9, 20, 64), "contiguous", dtype, device))
    logits = torch.einsum("bhnd,bhtd->bhnt", query.cpu().double(), key.cpu().double()) * 100.0
    assert logits.max() > 1000
    expected = logits.softmax(-1) @ value.cpu().double()
    assert_close(attend(query, key, value, 100.0).cpu(), expected, dtype)


@pytest.mark.parametrize("shape", FEW_KEYS + MANY_KEYS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_the_op(shape: tuple[int, ...], form: str, dtype: torch.dtype) -> None:
    check_op(shape, form, dtype, "cpu")


def test_the_op_with_large_logits(dtype: torch.dtype) -> None:
    check_large_logits(dtype, "cpu", kernel=False)


@pytest.mark.parametrize("sizes", [(8, 24), (40, 16)], ids=str)
def test_values_of_another_size(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    given = operands((2, 3, 5, 11, sizes[0]), "projected", dtype, value_size=sizes[1])
    actual = cross_attention(*given)
    assert actual.shape == (2, 3, 5, sizes[1]) and actual.transpose(1, 2).is_contiguous()
    assert_close(actual, written_out(*given, None), dtype)


@pytest.mark.parametrize("wrong", range(3), ids=("query", "key", "value"))
def test_heads_that_are_not_split_are_refused(wrong: int) -> None:
    given = list(operands((2, 3, 5, 7, 8), "contiguous", torch.float32))
    given[wrong] = given[wrong].transpose(1, 2).flatten(2)
    dimensions = [tensor.dim() for tensor in given]
    with pytest.raises(KernelError, match="got {}, {} and {} dimensions; split the heads first".format(*dimensions)):
        cross_attention(*given)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ((2, 3, 5, 8), (2, 3, 6, 8)),
        ((1, 3, 5, 8), (1, 3, 5, 8)),
        ((2, 1, 5, 8), (2, 1, 5, 8)),
        ((2, 3, 5, 4), (2, 3, 5, 4)),
    ],
    ids=["lengths", "batch", "heads", "size"],
)
def test_sizes_that_contradict_each_other_are_refused(key: tuple[int, ...], value: tuple[int, ...]) -> None:
    with pytest.raises(KernelError, match="must have one batch and number of heads"):
        cross_attention(torch.randn(2, 3, 4, 8), torch.randn(key), torch.randn(value))


def test_the_configurations_tried_here_are_those_that_are_chosen() -> None:
    pytest.importorskip("triton")
    from fisedit_compiler.kernels.triton.cross_attention import choose_blocks

    assert {choose_blocks(queries, size) for queries in range(100) for size in range(1, 257)} == set(CONFIGS)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", FEW_KEYS + MANY_KEYS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_the_op_on_a_gpu(shape: tuple[int, ...], form: str, dtype: torch.dtype) -> None:
    """Float32 and many keys, which the kernel does not serve, included."""
    check_op(shape, form, dtype, "cuda")


@pytest.mark.gpu
def test_what_the_kernel_does_not_serve_on_a_gpu(dtype: torch.dtype) -> None:
    for shape, value_size in (((2, 3, 5, 11, 40), 16), ((1, 2, 5, 11, 264), 264)):
        given = operands(shape, "projected", dtype, "cuda", value_size)
        actual = cross_attention(*given)
        assert actual.transpose(1, 2).is_contiguous()
        assert_close(actual.cpu(), written_out(*given, None), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", FEW_KEYS, ids=str)
@pytest.mark.parametrize(("form", "config"), KERNEL_CASES, ids=str)
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_the_kernel_on_a_gpu(
    shape: tuple[int, ...], form: str, config: tuple[int, int] | None, half: torch.dtype
) -> None:
    check_kernel(shape, form, config, half, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_the_kernel_with_large_logits_on_a_gpu(half: torch.dtype) -> None:
    check_large_logits(half, "cuda", kernel=True)


def test_in_the_interpreter() -> None:
    run_in_the_interpreter("tests.kernels.test_cross_attention")


if __name__ == "__main__":
    for shape, (form, config) in product(FEW_KEYS, KERNEL_CASES):
        check_kernel(shape, form, config, torch.float32, "cpu")
    check_large_logits(torch.float32, "cpu", kernel=True)
