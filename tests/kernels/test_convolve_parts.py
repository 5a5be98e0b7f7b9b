"""``convolve_parts``: added up, with the bias, it is ``convolve``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fisedit_compiler.geometry.patches import BLOCK_SIZES
from fisedit_compiler.kernels.convolve import convolve
from fisedit_compiler.kernels.convolve_parts import convolve_parts
from fisedit_compiler.kernels.matmul_parts import sum_parts
from fisedit_compiler.kernels.registry import KernelError
from fisedit_compiler.kernels.tolerances import assert_close
from tests.kernels.tables import GEOMETRIES, Geometry, convolution_case

CHANNELS = 5
LARGER = BLOCK_SIZES[1:]


def check(geometry: Geometry, count: int, size: int, dtype: torch.dtype, device: str) -> None:
    arguments, expected = convolution_case(geometry, count, size, dtype)
    moved = [argument.to(device) if isinstance(argument, Tensor) else argument for argument in arguments]
    values, taps, places, weight, bias, *options = moved
    kernel_taps = geometry.kernel**2
    # Cut between taps, between channels (inside of taps), and into single inputs.
    for parts in (1, kernel_taps, CHANNELS, kernel_taps * CHANNELS):
        actual = convolve_parts(values, taps, places, weight, parts, *options)
        assert actual.shape == (parts, *expected.shape)
        assert actual.dtype == dtype and actual.is_contiguous()
        for summand in (bias, None):
            whole = convolve(values, taps, places, weight, summand, *options)
            assert_close(sum_parts(actual, summand), whole, dtype)
        assert_close(sum_parts(actual, bias).cpu(), expected, dtype)


@pytest.mark.parametrize("size", BLOCK_SIZES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 5, 1000])
def test_the_parts_add_up(geometry: Geometry, count: int, size: int, dtype: torch.dtype) -> None:
    check(geometry, count, size, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("size", BLOCK_SIZES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("count", [0, 9])
def test_on_a_gpu(geometry: Geometry, count: int, size: int, dtype: torch.dtype) -> None:
    check(geometry, count, size, dtype, "cuda")


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_parts_are_products_of_consecutive_inputs(geometry: Geometry) -> None:
    """With a part per tap, a weight that is zero but for a tap leaves one part."""
    (values, taps, places, weight, _bias, *options), _ = convolution_case(geometry, 9, 1)
    kernel_taps = geometry.kernel**2
    for tap in range(kernel_taps):
        inputs = slice(tap * CHANNELS, (tap + 1) * CHANNELS)
        single = torch.zeros_like(weight)
        single[:, inputs] = weight[:, inputs]
        products = convolve_parts(values, taps, places, single, kernel_taps, *options)
        assert_close(products[tap], convolve(values, taps, places, single, None, *options), torch.float32)
        assert not torch.cat([products[:tap], products[tap + 1 :]]).any()


@pytest.mark.parametrize("size", LARGER)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_in_blocks_only_the_first_part_is_not_zero(geometry: Geometry, size: int) -> None:
    (values, taps, places, weight, _bias, *options), _ = convolution_case(geometry, 9, size)
    first, *others = convolve_parts(values, taps, places, weight, CHANNELS, *options)
    assert torch.equal(first, convolve(values, taps, places, weight, None, *options))
    assert not any(part.any() for part in others)


def arguments_with(size: int, **changed: Any) -> tuple[Any, ...]:
    """Arguments of the op for five outputs of a 3x3 convolution, some of them replaced."""
    (values, taps, places, weight, _bias, *options), _ = convolution_case(Geometry(8, 8), 5, size)
    given = {"values": values, "taps": taps, "places": places, "weight": weight, "parts": 3}
    return (*{**given, **changed}.values(), *options)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("parts", [0, 2, 7, -3])
def test_parts_that_are_no_divisor_are_refused(parts: int, size: int) -> None:
    with pytest.raises(KernelError, match=f"cannot be cut into {parts} equal parts"):
        convolve_parts(*arguments_with(size, parts=parts))


def test_a_line_of_taps_too_many_is_refused() -> None:
    _values, _taps, places, *_ = arguments_with(1)
    with pytest.raises(KernelError, match="convolve_parts: a table of taps has a line per output"):
        convolve_parts(*arguments_with(1, places=places[:-1]))


@pytest.mark.parametrize("size", [1, 4])
def test_what_is_no_convolution_is_refused(size: int) -> None:
    values, _taps, places, weight, *_ = arguments_with(size)
    with pytest.raises(KernelError, match=r"convolve_parts: values must be \[B, T, C\], got 2"):
        convolve_parts(*arguments_with(size, values=values[0]))
    with pytest.raises(KernelError, match=r"convolve_parts: .* places \[N\], got 2 and 2"):
        convolve_parts(*arguments_with(size, places=places[None]))
    with pytest.raises(KernelError, match=r"convolve_parts: .* pack_conv_weight"):
        convolve_parts(*arguments_with(size, weight=weight.view(7, 3, 3, CHANNELS)))
    with pytest.raises(KernelError, match="convolve_parts: weight has 40 inputs"):
        convolve_parts(*arguments_with(size, weight=weight[:, :40]))


def test_tables_of_another_convolution_are_refused() -> None:
    *given, _kernel, _stride, _dilation = arguments_with(4)
    with pytest.raises(KernelError, match=r"36 columns.*this convolution's blocks read 9 \(size 1\), 25 \(size 2\)"):
        convolve_parts(*given, (3, 3), (2, 2))
