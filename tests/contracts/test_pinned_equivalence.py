"""The packed program equals the pinned program, for every model, mask, size, batch and semantics.

The oracle (``reference/pinned.py``) knows nothing of the compiler but the active sites of the plan it used.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from torch import Tensor

from fisedit_compiler.kernels.tolerances import assert_close
from fisedit_compiler.masks import grown
from fisedit_compiler.passes import REQUIRED, REWRITES
from tests.support.compiled_zoo import (
    LARGE,
    SEMANTICS,
    Attention,
    Norm,
    Size,
    active_sets,
    base_inputs,
    base_run,
    compiled_model,
    edit_inputs,
    edited,
    edits,
    examples,
    make_mask,
    oracle,
    record_run,
)
from tests.support.zoo import UNETS

# Models that are no UNet, and whether any of their semantics differ (no attention, no norm: one is enough).
PLAIN = ("plain_conv", "pooled", "reflect", "vae_decoder")
NAMES = (*UNETS, *PLAIN)


def check(
    name: str,
    batch: int,
    size: Size,
    mask: Tensor,
    norm: Norm,
    attention: Attention,
    dtype: torch.dtype = torch.float32,
) -> None:
    """One edit by the packed program and by the oracle."""
    compiled = compiled_model(name, norm, attention, dtype=dtype)
    base = base_run(name, norm, attention, batch, size, dtype)
    inputs = edit_inputs(name, batch, size, mask, dtype)
    packed, session = edited(compiled, base, inputs, mask)
    run = oracle(name, batch, size, dtype)
    if not mask.any():
        assert session.plan is None and torch.equal(packed, base.output)
        return
    pinned = run.replay(inputs, active_sets(session), norm=norm, attention=attention)
    assert torch.equal(base.output, run.base_output)
    assert_close(packed, pinned, dtype)


@pytest.mark.parametrize(("norm", "attention"), SEMANTICS)
@pytest.mark.parametrize("name", UNETS)
def test_unet_equals_the_oracle(name: str, norm: Norm, attention: Attention) -> None:
    @examples(0.32)
    @given(edits())
    def packed_equals_pinned(edit: tuple[int, Size, Tensor]) -> None:
        check(name, *edit, norm, attention)

    packed_equals_pinned()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mask", ["block", "scattered"])
def test_a_larger_map(name: str, mask: str) -> None:
    check(name, 1, LARGE, make_mask(mask, LARGE, seed=8), "incremental", "cached")


@pytest.mark.parametrize(("norm", "attention"), [SEMANTICS[0], SEMANTICS[3]])
@pytest.mark.parametrize("name", PLAIN)
def test_other_models_equal_the_oracle(name: str, norm: Norm, attention: Attention) -> None:
    """Dense islands, sizes that are no level, outputs finer than the input."""

    @examples(0.40)
    @given(edits())
    def packed_equals_pinned(edit: tuple[int, Size, Tensor]) -> None:
        check(name, *edit, norm, attention)

    packed_equals_pinned()


@pytest.mark.parametrize("name", ["sd15", "sdxl", "vae_decoder", "pooled"])
def test_bfloat16_equals_the_oracle(name: str) -> None:
    """Both sides in bfloat16, judged by the table's row: a network of normalised layers forgets old roundings."""

    @examples(0.24)
    @given(edits())
    def packed_equals_pinned(edit: tuple[int, Size, Tensor]) -> None:
        for norm, attention in (SEMANTICS[0], SEMANTICS[3]):
            check(name, *edit, norm, attention, torch.bfloat16)

    packed_equals_pinned()


@pytest.mark.parametrize("sites", [1, 3])
def test_dilation_grows_the_mask_before_anything_else(sites: int) -> None:
    """A mask grown by the configuration is a grown mask, bit for bit, and still equals the oracle."""
    name, batch, size = "sd21", 2, (20, 12)
    mask = make_mask("block", size, seed=3)
    compiled = compiled_model(name, dilation=sites)
    base = record_run(compiled, base_inputs(name, batch, size))
    inputs = edit_inputs(name, batch, size, mask)
    packed, session = edited(compiled, base, inputs, mask)
    assert torch.equal(active_sets(session)[size], grown(mask, sites))
    assert_close(packed, oracle(name, batch, size).replay(inputs, active_sets(session)), torch.float32)
    plain = compiled_model(name)
    by_hand, _ = edited(plain, base_run(name, "recorded", "cached", batch, size), inputs, grown(mask, sites))
    assert torch.equal(packed, by_hand)


# What the oracle must be told when a pass that mixes sites is left out; the other passes work site by site, so
# leaving them out moves no boundary.
PINNED_THEN: dict[str, frozenset[str]] = {
    "convolution": frozenset({"conv2d"})  # reads the fine map behind an upsampling, no longer the coarse one
}
NORM_THEN: dict[str, Norm] = {"group_norm": "incremental"}  # a dense norm measures the pinned canvas
ATTENTION_THEN: dict[str, Attention] = {"self_attention": "cached"}  # dense attention reads the pinned canvas


@pytest.mark.parametrize("name", ["sd21", "pooled"])
@pytest.mark.parametrize("disabled", sorted({rewrite.name for rewrite in REWRITES} - REQUIRED))
def test_a_disabled_pass_leaves_dense_islands_and_equal_results(name: str, disabled: str) -> None:
    batch, size = 2, (16, 24)
    norm: Norm = "recorded"
    attention: Attention = "active"
    compiled = compiled_model(name, norm, attention, disabled=frozenset({disabled}))
    base = record_run(compiled, base_inputs(name, batch, size))
    run = oracle(name, batch, size, pin_inputs_of=PINNED_THEN.get(disabled, frozenset()))
    assert torch.equal(base.output, run.base_output)
    for kind in ("block", "scattered"):
        mask = make_mask(kind, size, seed=5)
        inputs = edit_inputs(name, batch, size, mask)
        packed, session = edited(compiled, base, inputs, mask)
        pinned = run.replay(
            inputs,
            active_sets(session),
            norm=NORM_THEN.get(disabled, norm),
            attention=ATTENTION_THEN.get(disabled, attention),
        )
        assert_close(packed, pinned, torch.float32)
