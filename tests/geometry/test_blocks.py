"""Plans in blocks: tables entry by entry against plain loops, and the same results whatever the size."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fisedit_compiler import SparsifyConfig, sparsify
from fisedit_compiler.errors import PlanError
from fisedit_compiler.geometry.conv_tables import ConvKey
from fisedit_compiler.geometry.patches import BLOCK_SIZES, output_taps
from fisedit_compiler.geometry.site_plan import SitePlan
from fisedit_compiler.kernels.tolerances import assert_close
from fisedit_compiler.runtime.execution.padded_plans import block_bucket
from tests.support.compiled_zoo import (
    MASKS,
    active_sets,
    base_run,
    compiled_model,
    edit_inputs,
    edited,
    edits,
    examples,
    make_mask,
    oracle,
    output_of,
    record_run,
    zoo_model,
)

ONE, TWO, HALF = Fraction(1), Fraction(2), Fraction(1, 2)
LEVELS = (HALF, ONE, TWO)
CONVS = (
    ConvKey(ONE, ONE, (3, 3), padding=(1, 1)),
    ConvKey(TWO, TWO, (3, 3), padding=(2, 2), dilation=(2, 2)),
    ConvKey(TWO, TWO, (1, 1)),
    ConvKey(ONE, ONE, (3, 1), padding=(1, 0)),
    ConvKey(ONE, TWO, (3, 3), stride=(2, 2), padding=(1, 1)),
    ConvKey(TWO, ONE, (3, 3), padding=(1, 1), upsample=2),
    ConvKey(ONE, HALF, (3, 3), padding=(1, 1), upsample=2),
)
LARGER = BLOCK_SIZES[1:]
SIZES = ((6, 10), (12, 8), (2, 2), (22, 14))
"""Lattices that no block size divides at every level, so that blocks overhang the border."""


def forced(plan: SitePlan, size: int) -> SitePlan:
    return plan.blocked(dict.fromkeys(plan.active, size))


def in_every_size(plan: SitePlan) -> Mapping[int, SitePlan]:
    return {size: forced(plan, size) for size in LARGER}


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    height, width = draw(st.sampled_from(SIZES))
    share = draw(st.sampled_from([0.0, 0.03, 0.2, 0.6, 1.0]))
    return torch.rand(height, width, generator=torch.Generator().manual_seed(draw(st.integers(0, 999)))) < share


@given(mask=masks())
def test_every_output_reads_what_it_reads_in_size_one(mask: Tensor) -> None:
    plain = SitePlan.build(mask, LEVELS, CONVS)
    for size, plan in in_every_size(plain).items():
        assert all(torch.equal(plan.ring[key], plain.ring[key]) for key in CONVS), "the ring does not grow"
        for key in CONVS:
            if not key.in_blocks:
                assert torch.equal(plan.taps[key], plain.taps[key])
                continue
            geometry = (key.kernel, key.stride, key.dilation)
            taps = output_taps(plan.taps[key], plan.places[key.target], size, *geometry)
            assert torch.equal(taps, plain.taps[key])


@given(mask=masks())
def test_blocks_are_aligned_and_only_those_with_an_active_site(mask: Tensor) -> None:
    plain = SitePlan.build(mask, LEVELS, CONVS)
    for size, plan in in_every_size(plain).items():
        for level in LEVELS:
            width = plan.size(level)[1]
            found = sorted({(site // width // size, site % width // size) for site in plan.active[level].tolist()})
            assert plan.block_count(level, size) == len(found)
            assert plan.blocks[level] == len(found)
            for site, place in zip(plan.active[level].tolist(), plan.places[level].tolist(), strict=True):
                block, y, x = found[place // size**2], site // width, site % width
                assert block == (y // size, x // size)
                assert place % size**2 == y % size * size + x % size
        for key in CONVS:
            if key.in_blocks:
                height, width = key.patch(size)
                assert plan.taps[key].shape == (plan.blocks[key.target], height * width)
                zero = plan.rows(key.source) + plan.ring[key].shape[0]
                assert not plan.taps[key].numel() or 0 <= int(plan.taps[key].min()) <= int(plan.taps[key].max()) <= zero


def test_sizes_may_differ_by_level_and_default_to_one() -> None:
    mask = make_mask("block", (16, 24))
    plan = SitePlan.build(mask, LEVELS, CONVS, block_sizes={ONE: 4, TWO: 1})
    assert [plan.block_size(level) for level in LEVELS] == [1, 4, 1]
    assert set(plan.blocks) == {ONE}
    text = plan.summary()
    assert "in blocks of 4x4" in text and f"outputs in {plan.blocks[ONE]} blocks x 6x6 sites" in text
    assert "in blocks" not in SitePlan.build(mask, LEVELS, CONVS).summary()


def test_wrong_sizes_are_refused() -> None:
    plan = SitePlan.build(make_mask("block", (16, 24)), LEVELS, CONVS)
    with pytest.raises(PlanError, match="block size 3 at level 2 is none of 1, 2, 4, 8"):
        plan.blocked({TWO: 3})
    with pytest.raises(PlanError, match="has blocks already"):
        forced(plan, 4).blocked({ONE: 2})


@given(mask=masks(), size=st.sampled_from(LARGER), extra=st.integers(0, 3))
def test_padded_plans_in_blocks_read_the_same(mask: Tensor, size: int, extra: int) -> None:
    if not mask.any():
        return
    plan = forced(SitePlan.build(mask, LEVELS, CONVS), size)
    rows = {level: plan.rows(level) + extra for level in LEVELS}
    rings = {key: plan.ring[key].shape[0] + extra for key in CONVS}
    blocks = {level: count + extra for level, count in plan.blocks.items()}
    padded = plan.padded(rows, rings, blocks)
    assert padded.block_sizes == plan.block_sizes and padded.blocks == blocks
    for level in LEVELS:
        places = plan.places[level].tolist()
        assert padded.places[level].tolist() == places + places[-1:] * extra
    for key in CONVS:
        before = [*plan.active[key.source].tolist(), *plan.ring[key].tolist(), None]
        after = [*padded.active[key.source].tolist(), *padded.ring[key].tolist(), None]
        read_before = [[before[tap] for tap in line] for line in plan.taps[key].tolist()]
        read_after = [[after[tap] for tap in line] for line in padded.taps[key].tolist()]
        assert read_after == read_before + read_before[-1:] * extra
    unnamed = plan.padded(rows, rings)
    assert unnamed.blocks == plan.blocks, "blocks that are not named stay as they are"


@given(count=st.integers(1, 5000), size=st.sampled_from(LARGER))
def test_buckets_of_blocks_waste_little(count: int, size: int) -> None:
    padded = block_bucket(count, size)
    assert padded >= max(count, 2)
    assert padded - count < max(16 / size**2, 2, count / 8)
    assert block_bucket(padded, size) == padded


@pytest.mark.parametrize("name", ["sd15", "sdxl", "plain_conv", "vae_decoder"])
def test_every_size_gives_the_pinned_program(name: str) -> None:
    """Each kind of mask, on sizes whose coarse levels no block divides."""

    @examples(0.25)
    @given(edits(empty=False), st.sampled_from(LARGER))
    def equal(edit: tuple[int, tuple[int, int], Tensor], size: int) -> None:
        batch, latent, mask = edit
        compiled, base = compiled_model(name), base_run(name, "recorded", "cached", batch, latent)
        inputs = edit_inputs(name, batch, latent, mask)
        (program,) = compiled.programs
        plan = forced(SitePlan.build(mask, program.levels, program.convs), size)
        with compiled.edit(base.recording, mask) as session:
            session.plan = plan
            output = output_of(compiled(**inputs))
        assert session.plan is plan
        pinned = oracle(name, batch, latent).replay(inputs, active_sets(session), norm="recorded", attention="cached")
        assert_close(output, pinned, torch.float32)

    equal()


def test_a_configured_size_is_used_everywhere_and_gives_the_same() -> None:
    name, latent = "sd15", (40, 56)
    model = zoo_model(name)
    modules = {
        size: sparsify(model.module, SparsifyConfig(block_size=size, dense_above=1.0)) for size in (None, *BLOCK_SIZES)
    }
    base = record_run(compiled_model(name), edit_inputs(name, 2, latent, make_mask("empty", latent)))
    for kind in MASKS[1:]:
        mask = make_mask(kind, latent, seed=4)
        inputs = model.edit_inputs(base.inputs, mask)
        outputs = {}
        for size, compiled in modules.items():
            outputs[size], session = edited(compiled, base, inputs, mask)
            assert session.plan is not None
            levels = {key.target for key in session.plan.taps if key.in_blocks}
            if size is not None:
                assert {session.plan.block_size(level) for level in levels} == {size}
        for output in outputs.values():
            assert_close(output, outputs[1], torch.float32)


def test_a_recorded_edit_in_blocks_records_the_same() -> None:
    name, latent = "sd15", (20, 12)
    model = zoo_model(name)
    mask = make_mask("block", latent)
    base = base_run(name, "recorded", "cached", 2, latent)
    results = []
    for size in (1, 4):
        compiled = sparsify(model.module, SparsifyConfig(block_size=size, dense_above=1.0))
        with compiled.edit(base.recording, mask, record=True) as session:
            compiled(**edit_inputs(name, 2, latent, mask))
        assert session.result is not None
        results.append(session.result.calls[0].slots)
    for slot, value in results[0].items():
        assert_close(results[1][slot].float(), value.float(), torch.float32)
