"""Site plans against tables made by plain loops, and the invariants that every plan keeps."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fisedit_compiler.errors import MaskError, PlanError
from fisedit_compiler.geometry.conv_tables import ConvKey
from fisedit_compiler.geometry.site_plan import SitePlan

ONE, TWO, FOUR, HALF = Fraction(1), Fraction(2), Fraction(4), Fraction(1, 2)
LEVELS = (HALF, ONE, TWO, FOUR)
CONVS = (
    ConvKey(ONE, ONE, (3, 3), padding=(1, 1)),
    ConvKey(TWO, TWO, (3, 3), padding=(2, 2), dilation=(2, 2)),
    ConvKey(TWO, TWO, (1, 1)),
    ConvKey(ONE, ONE, (3, 1), padding=(1, 0)),
    ConvKey(ONE, TWO, (3, 3), stride=(2, 2), padding=(1, 1)),
    ConvKey(TWO, ONE, (3, 3), padding=(1, 1), upsample=2),
    ConvKey(ONE, HALF, (3, 3), padding=(1, 1), upsample=2),
    ConvKey(FOUR, ONE, (3, 3), padding=(1, 1), upsample=4),
)


def _mask(height: int, width: int, share: float, seed: int = 0) -> Tensor:
    return torch.rand(height, width, generator=torch.Generator().manual_seed(seed)) < share


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    """Masks of any size divisible by four, from empty to full."""
    height, width = 4 * draw(st.integers(1, 4)), 4 * draw(st.integers(1, 4))
    share = draw(st.sampled_from([0.0, 0.02, 0.1, 0.5, 0.95, 1.0]))
    return _mask(height, width, share, draw(st.integers(0, 1000)))


def _active_by_loops(mask: Tensor, level: Fraction) -> list[int]:
    width = mask.shape[1]
    found = set()
    for y, x in mask.nonzero().tolist():
        repeat = level.denominator
        for i in range(repeat):
            for j in range(repeat):
                row, column = (y * repeat + i) // level.numerator, (x * repeat + j) // level.numerator
                found.add(row * int(width / level) + column)
    return sorted(found)


def _read_by_loops(key: ConvKey, site: int, size_in: tuple[int, int], width_out: int) -> list[int | None]:
    reads: list[int | None] = []
    for i in range(key.kernel[0]):
        for j in range(key.kernel[1]):
            y = (site // width_out) * key.stride[0] - key.padding[0] + i * key.dilation[0]
            x = (site % width_out) * key.stride[1] - key.padding[1] + j * key.dilation[1]
            if 0 <= y < size_in[0] * key.upsample and 0 <= x < size_in[1] * key.upsample:
                reads.append((y // key.upsample) * size_in[1] + x // key.upsample)
            else:
                reads.append(None)
    return reads


@given(mask=masks())
def test_active_sites_and_taps_are_those_of_plain_loops(mask: Tensor) -> None:
    plan = SitePlan.build(mask, LEVELS, CONVS)
    for level in LEVELS:
        assert plan.active[level].tolist() == _active_by_loops(mask, level)
    for key in CONVS:
        active, ring = plan.active[key.source].tolist(), plan.ring[key].tolist()
        sources: list[int | None] = [*active, *ring, None]
        width_out = plan.size(key.target)[1]
        outputs = plan.active[key.target].tolist()
        assert plan.taps[key].shape == (len(outputs), key.kernel[0] * key.kernel[1])
        for site, taps in zip(outputs, plan.taps[key].tolist(), strict=True):
            expected = _read_by_loops(key, site, plan.size(key.source), width_out)
            assert [sources[tap] for tap in taps] == expected


@given(mask=masks(), dilation=st.integers(0, 2), dense=st.sampled_from([(), (TWO,), (FOUR,), (HALF,)]))
def test_invariants(mask: Tensor, dilation: int, dense: tuple[Fraction, ...]) -> None:
    plan = SitePlan.build(mask, LEVELS, CONVS, dilation=dilation, dense_levels=dense)
    for fine, coarse in pairwise(LEVELS):
        parents = plan.active_mask(coarse).repeat_interleave(2, 0).repeat_interleave(2, 1)
        assert (parents | ~plan.active_mask(fine)).all(), "the parent of an active site is active"
    for key in CONVS:
        ring, active, taps = plan.ring[key], plan.active[key.source], plan.taps[key]
        assert not torch.isin(ring, active).any()
        assert torch.equal(ring, ring.unique())
        assert taps.dtype == ring.dtype == active.dtype == torch.int64
        zero = len(active) + len(ring)
        assert not taps.numel() or (int(taps.min()) >= 0 and int(taps.max()) <= zero)
        used = torch.arange(len(active), zero)
        assert torch.isin(used, taps).all(), "a ring site that nobody reads"
    for level in LEVELS:
        assert torch.equal(plan.active_mask(level).flatten().nonzero().flatten(), plan.active[level])
        assert plan.rows(level) == len(plan.active[level])


def test_empty_mask_plans_nothing_even_with_dense_levels() -> None:
    plan = SitePlan.build(torch.zeros(8, 4, dtype=torch.bool), LEVELS, CONVS, dense_levels=[TWO])
    assert plan.is_empty and not plan.is_full and plan.area == 0
    assert all(plan.rows(level) == 0 for level in LEVELS)
    assert all(plan.ring[key].numel() == 0 and plan.taps[key].shape[0] == 0 for key in CONVS)


def test_full_mask_has_no_ring() -> None:
    plan = SitePlan.build(torch.ones(8, 4, dtype=torch.bool), LEVELS, CONVS)
    assert plan.is_full and not plan.is_empty and plan.area == 1
    assert all(plan.ring[key].numel() == 0 for key in CONVS)


@pytest.mark.parametrize("sites", [1, 2, 5])
def test_dilation_grows_a_square(sites: int) -> None:
    mask = torch.zeros(12, 16, dtype=torch.bool)
    mask[6, 1] = True
    grown = SitePlan.build(mask, [], [], dilation=sites).active_mask(ONE)
    expected = torch.zeros_like(mask)
    expected[max(0, 6 - sites) : 7 + sites, max(0, 1 - sites) : 2 + sites] = True
    assert torch.equal(grown, expected)
    assert int(mask.sum()) == 1, "the caller's mask is untouched"


def test_dense_level_makes_coarser_levels_dense_and_leaves_finer_ones() -> None:
    mask = torch.zeros(16, 8, dtype=torch.bool)
    mask[0, 0] = True
    plan = SitePlan.build(mask, LEVELS, [], dense_levels=[TWO])
    assert [plan.rows(level) for level in LEVELS] == [4, 1, 32, 8]
    assert not plan.is_full


def test_levels_of_convolutions_are_planned_without_being_named() -> None:
    plan = SitePlan.build(torch.ones(8, 8, dtype=torch.bool), [], [CONVS[4]])
    assert set(plan.active) == {ONE, TWO}


def test_equal_keys_share_tables() -> None:
    plan = SitePlan.build(_mask(8, 8, 0.1), [], [CONVS[0], ConvKey(Fraction(2, 2), ONE, (3, 3), padding=(1, 1))])
    assert len(plan.taps) == 1


def test_non_contiguous_mask() -> None:
    mask = _mask(8, 16, 0.2)
    transposed = SitePlan.build(mask.T, LEVELS, CONVS)
    assert torch.equal(transposed.active[TWO], SitePlan.build(mask.T.contiguous(), LEVELS, CONVS).active[TWO])


def test_device_moves_every_table() -> None:
    plan = SitePlan.build(_mask(8, 8, 0.2), LEVELS, CONVS, device="meta")
    tables = [*plan.active.values(), *plan.ring.values(), *plan.taps.values()]
    assert all(table.device.type == "meta" for table in tables)


def test_summary_names_every_level_and_convolution() -> None:
    plan = SitePlan.build(_mask(8, 8, 0.2), LEVELS, CONVS)
    text = repr(plan)
    assert text == plan.summary()
    assert all(f"level {level!s:>4}" in text for level in LEVELS)
    assert all(str(key) in text for key in CONVS)


def test_drawing() -> None:
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:2, :4] = True
    mask[6, 7] = True
    plan = SitePlan.build(mask, LEVELS, [])
    assert plan.draw() == "████····\n········\n········\n·······▒"
    wide = SitePlan.build(_mask(200, 300, 0.1), [], []).draw(max_width=50).splitlines()
    assert len(wide) == 17 and {len(line) for line in wide} == {50}


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(4, 4), "mask > 0.5"),
        (torch.zeros(1, 4, 4, dtype=torch.bool), r"\[H, W\]"),
        (torch.zeros(0, 4, dtype=torch.bool), r"\[H, W\]"),
        ([[True]], "list"),
    ],
)
def test_wrong_masks_are_refused(mask: Tensor, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        SitePlan.build(mask, [ONE], [])


def test_wrong_levels_and_geometries_are_refused() -> None:
    mask = torch.ones(6, 8, dtype=torch.bool)
    with pytest.raises(PlanError, match="multiple of 4"):
        SitePlan.build(mask, [FOUR], [])
    with pytest.raises(PlanError, match="whole factor"):
        SitePlan.build(mask, [Fraction(3, 2)], [])
    with pytest.raises(PlanError, match="padding"):
        SitePlan.build(mask, [], [ConvKey(ONE, ONE, (3, 3))])
    with pytest.raises(PlanError, match="0 or more"):
        SitePlan.build(mask, [], [], dilation=-1)
    with pytest.raises(PlanError, match="name it in `levels`"):
        SitePlan.build(mask, [], []).rows(TWO)
