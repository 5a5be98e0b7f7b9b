"""``convolve`` in blocks against taps and against a dense convolution, and the tables that say the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fisedit_compiler.geometry.patches import BLOCK_SIZES, block_size_of, output_taps, patch_shape
from fisedit_compiler.kernels.convolve import convolve
from fisedit_compiler.kernels.registry import KernelError
from fisedit_compiler.kernels.tolerances import assert_close
from tests.kernels.tables import GEOMETRIES, Geometry, convolution_case, options

LARGER = BLOCK_SIZES[1:]


@pytest.mark.parametrize("size", LARGER)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 5, 1000])
def test_blocks_give_the_dense_convolution(geometry: Geometry, count: int, size: int, dtype: torch.dtype) -> None:
    arguments, expected = convolution_case(geometry, count, size, dtype)
    actual = convolve(*arguments)
    assert actual.dtype == dtype and actual.is_contiguous()
    assert_close(actual, expected, dtype)


@pytest.mark.parametrize("size", LARGER)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_patches_and_taps_say_the_same(geometry: Geometry, size: int) -> None:
    (values, patches, places, *rest), _ = convolution_case(geometry, 9, size)
    taps = output_taps(patches, places, size, *options(geometry))
    assert taps.shape == (places.shape[0], geometry.kernel**2)
    in_blocks = convolve(values, patches, places, *rest)
    assert_close(convolve(values, taps, places, *rest), in_blocks, torch.float32)


@given(
    kernel=st.integers(1, 5), stride=st.integers(1, 4), dilation=st.integers(1, 3), size=st.sampled_from(BLOCK_SIZES)
)
def test_a_table_tells_its_block_size(kernel: int, stride: int, dilation: int, size: int) -> None:
    geometry = ((kernel,) * 2, (stride,) * 2, (dilation,) * 2)
    height, width = patch_shape(size, *geometry)
    assert block_size_of(height * width, *geometry) == size
    assert block_size_of(height * width + 1, *geometry) != size


def test_a_block_of_nobodys_values_is_dropped() -> None:
    """What lies in a patch and is read by no wanted output may be anything."""
    (values, patches, places, *rest), _ = convolution_case(Geometry(8, 8), 64, 4)
    corner = places[:1]
    read = output_taps(patches, corner, 4, *options(Geometry(8, 8)))
    poisoned = torch.full_like(values, float("nan"))
    poisoned[:, read.flatten()] = values[:, read.flatten()]
    assert_close(convolve(poisoned, patches, corner, *rest), convolve(values, patches, corner, *rest), torch.float32)


def test_tables_of_another_convolution_are_refused() -> None:
    (values, patches, places, weight, bias, *_), _ = convolution_case(Geometry(8, 8), 5, 4)
    with pytest.raises(KernelError, match=r"36 columns.*this convolution's blocks read 9 \(size 1\), 25 \(size 2\)"):
        convolve(values, patches, places, weight, bias, (3, 3), (2, 2))
    taps = output_taps(patches, places, 4, *options(Geometry(8, 8)))
    with pytest.raises(KernelError, match="5 lines and 3 places"):
        convolve(values, taps, places[:3], weight, bias, (3, 3))
    with pytest.raises(KernelError, match="pack_conv_weight"):
        convolve(values, patches, places, weight.view(7, 3, 3, 5), bias, (3, 3))
    with pytest.raises(KernelError, match=r"places \[N\], got 2 and 2"):
        convolve(values, patches, places[None], weight, bias, (3, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("size", LARGER)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("kind", [torch.float16, torch.float32], ids=str)
def test_on_a_gpu(geometry: Geometry, size: int, kind: torch.dtype) -> None:
    arguments, expected = convolution_case(geometry, 9, size, kind)
    moved = [argument.cuda() if isinstance(argument, Tensor) else argument for argument in arguments]
    assert_close(convolve(*moved).cpu(), expected, kind)
