"""``conv2d_sites`` against a dense convolution of the patched map."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fisedit_compiler.kernels.conv2d_sites import conv2d_sites
from fisedit_compiler.kernels.pack_conv_weight import pack_conv_weight
from fisedit_compiler.kernels.registry import KernelError
from fisedit_compiler.kernels.tolerances import assert_close
from tests.kernels.tables import Geometry, brute_force_taps, pick, strided


def _compare(
    geometry: Geometry,
    count_in: int,
    count_out: int,
    dtype: torch.dtype,
    *,
    batch: int = 2,
    channels: int = 5,
    with_bias: bool = True,
    use_strides: bool = False,
) -> None:
    sites, out_sites = geometry.height * geometry.width, geometry.out_size[0] * geometry.out_size[1]
    active_in, active_out = pick(sites, count_in), pick(out_sites, count_out)
    canvas = torch.randn(batch, sites, channels).to(dtype)
    rows = torch.randn(batch, len(active_in), channels).to(dtype)
    weight = torch.randn(7, channels, geometry.kernel, geometry.kernel).to(dtype)
    bias = torch.randn(7).to(dtype) if with_bias else None
    ring, taps = brute_force_taps(geometry, active_in, active_out)

    patched = canvas.double().index_copy(1, active_in, rows.double())
    dense = F.conv2d(
        patched.transpose(1, 2).reshape(batch, channels, geometry.height, geometry.width),
        weight.double(),
        None if bias is None else bias.double(),
        geometry.stride,
        geometry.padding,
        geometry.dilation,
    )
    expected = dense.flatten(2).transpose(1, 2)[:, active_out]

    if use_strides:
        rows, canvas = strided(rows), strided(canvas)
    places = torch.arange(len(active_out))
    options = (geometry.kernel,) * 2, (geometry.stride,) * 2, (geometry.dilation,) * 2
    actual = conv2d_sites(rows, canvas, ring, taps, places, pack_conv_weight(weight), bias, *options)
    assert actual.dtype == dtype and actual.is_contiguous()
    assert_close(actual, expected, dtype)


GEOMETRIES = [
    Geometry(6, 4),
    Geometry(4, 6, stride=2),
    Geometry(5, 5, kernel=1, padding=0),
    Geometry(7, 6, dilation=2, padding=2),
    Geometry(6, 6, padding=0),
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("use_strides", [False, True])
def test_equals_dense_convolution(geometry: Geometry, use_strides: bool, dtype: torch.dtype) -> None:
    _compare(geometry, 5, 5, dtype, use_strides=use_strides)


@pytest.mark.parametrize("count_in", [0, 1, 7, 24])
@pytest.mark.parametrize("count_out", [0, 1, 7, 24])
@pytest.mark.parametrize("batch", [1, 3])
def test_any_number_of_rows(count_in: int, count_out: int, batch: int, dtype: torch.dtype) -> None:
    _compare(Geometry(6, 4), count_in, count_out, dtype, batch=batch)


def test_without_bias(dtype: torch.dtype) -> None:
    _compare(Geometry(6, 4), 3, 3, dtype, with_bias=False)


@given(
    height=st.integers(1, 8),
    width=st.integers(1, 8),
    kernel=st.sampled_from([1, 2, 3]),
    stride=st.integers(1, 2),
    padding=st.integers(1, 2),
    share=st.floats(0, 1),
)
def test_any_geometry(height: int, width: int, kernel: int, stride: int, padding: int, share: float) -> None:
    geometry = Geometry(height, width, kernel, stride, padding)
    out_sites = geometry.out_size[0] * geometry.out_size[1]
    _compare(geometry, round(share * height * width), round(share * out_sites), torch.float32)


def test_unpacked_weight_is_refused() -> None:
    rows, ring = torch.randn(1, 2, 3), torch.zeros(0, dtype=torch.int64)
    taps = torch.zeros(2, 9, dtype=torch.int64)
    places = torch.arange(2)
    with pytest.raises(KernelError, match="pack_conv_weight"):
        conv2d_sites(rows, rows, ring, taps, places, torch.randn(4, 3, 3, 3), None, (3, 3))
    with pytest.raises(KernelError, match="same convolution"):
        conv2d_sites(rows, rows, ring, taps, places, torch.randn(4, 3), None, (3, 3))


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (1, 1, 1, 1), (4, 1, 1, 1), (2, 3, 1, 2)])
def test_packed_weight_is_tap_major_and_owns_its_memory(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    packed = pack_conv_weight(weight)
    _, channels, height, width = shape
    for i in range(height):
        for j in range(width):
            start = (i * width + j) * channels
            assert torch.equal(packed[:, start : start + channels], weight[:, :, i, j])
    assert packed.is_contiguous() and packed.data_ptr() != weight.data_ptr()


def test_weight_of_wrong_rank_is_refused() -> None:
    with pytest.raises(KernelError, match=r"\[O, C, kh, kw\]"):
        pack_conv_weight(torch.randn(3, 3))
