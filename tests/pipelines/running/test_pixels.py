"""Pictures that leave the device as bytes are those of diffusers, pixel by pixel."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given
from hypothesis import strategies as st

from fisedit_compiler.pipelines import Editor
from fisedit_compiler.pipelines.running.pixels import gives_tensors, pictures
from tests.support.tiny_pipeline import make_tiny_pipeline
from tests.support.waits import watched

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def assert_same(decoded: torch.Tensor) -> None:
    """Compare the pictures of what a decoder gave, in [-1, 1] or beyond."""
    processor = VaeImageProcessor()
    expected = processor.postprocess(decoded, output_type="pil")
    found = pictures(processor.postprocess(decoded, output_type="pt"))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.mode == other.mode and one.size == other.size
        assert np.array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([0.3, 1.0, 3.0]))
def test_random_pictures(dtype: torch.dtype, seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    assert_same((spread * torch.randn(2, 3, 16, 24, generator=generator)).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_between_two_bytes(dtype: torch.dtype) -> None:
    """Every tie, and its neighbours on either side."""
    ties = (torch.arange(-2, 258).double() + 0.5) / 255 * 2 - 1
    values = torch.stack([(ties + step * 2.0**-24).to(dtype) for step in range(-8, 9)])
    assert_same(values.repeat(1, 3).view(1, 3, -1, 26))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_number_of_half_precision(dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = torch.where(values.isfinite(), values, torch.zeros_like(values))
    assert_same(values.view(1, 1, 256, 256))


def test_no_number_is_some_byte_in_both() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's
        assert_same(torch.tensor([float("inf"), float("-inf"), 1e30, -0.0] * 3).view(1, 3, 2, 2))


def test_one_copy_leaves_the_device() -> None:
    images = torch.rand(2, 3, 8, 8)
    with watched(images) as waits:
        pictures(images)
    assert [wait.operation for wait in waits.found] == ["Tensor.cpu"]


def test_an_editors_picture_is_the_pipelines(pinned_editor: Editor, generate: Callable[..., Any]) -> None:
    base = generate("a cat")
    pipe = pinned_editor.pipe
    expected = pipe(
        "a cat", num_inference_steps=7, guidance_scale=5.0, generator=torch.Generator().manual_seed(3)
    ).images[0]
    assert np.array_equal(np.asarray(base.image), np.asarray(expected))


class Own(StableDiffusionPipeline):
    """Makes pictures of its own kind."""


class OwnProcessor(VaeImageProcessor):
    """Likewise."""


def test_what_is_not_diffusers_own_makes_its_pictures_itself() -> None:
    pipe = make_tiny_pipeline()
    assert gives_tensors(pipe, {}) and gives_tensors(pipe, {"eta": 0.0})
    assert not gives_tensors(pipe, {"padding_mask_crop": 8})
    pipe.image_processor.numpy_to_pil = lambda images: images
    assert not gives_tensors(pipe, {})
    pipe.image_processor = OwnProcessor()
    assert not gives_tensors(pipe, {})
    other = make_tiny_pipeline()
    other.__class__ = Own
    assert not gives_tensors(other, {})
    assert not gives_tensors(object(), {})
