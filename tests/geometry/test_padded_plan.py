"""Padded plans: tables checked entry by entry, and the same results when a step runs on them."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fisedit_compiler.errors import PlanError
from fisedit_compiler.geometry.conv_tables import ConvKey
from fisedit_compiler.geometry.site_plan import SitePlan
from fisedit_compiler.kernels.tolerances import assert_close
from fisedit_compiler.runtime.execution.padded_plans import bucket
from tests.support.compiled_zoo import base_run, compiled_model, edit_inputs, edited, make_mask, output_of

ONE, TWO, HALF = Fraction(1), Fraction(2), Fraction(1, 2)
LEVELS = (HALF, ONE, TWO)
CONVS = (
    ConvKey(ONE, ONE, (3, 3), padding=(1, 1)),
    ConvKey(TWO, TWO, (1, 1)),
    ConvKey(ONE, TWO, (3, 3), stride=(2, 2), padding=(1, 1)),
    ConvKey(TWO, ONE, (3, 3), padding=(1, 1), upsample=2),
    ConvKey(ONE, HALF, (3, 3), padding=(1, 1), upsample=2),
)


def pad(plan: SitePlan, size: Callable[[int], int]) -> SitePlan:
    """The plan with every number of rows and ring sites mapped by ``size``."""
    rows = {level: size(table.shape[0]) for level, table in plan.active.items()}
    return plan.padded(rows, {key: size(table.shape[0]) for key, table in plan.ring.items()})


def repeated(entries: list[int], count: int) -> list[int]:
    return entries + entries[-1:] * (count - len(entries))


@given(
    share=st.sampled_from([0.02, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 1000),
    extra=st.lists(st.integers(0, 5), min_size=len(LEVELS) + len(CONVS), max_size=len(LEVELS) + len(CONVS)),
)
def test_tables_read_the_same_sites(share: float, seed: int, extra: list[int]) -> None:
    mask = torch.rand(8, 12, generator=torch.Generator().manual_seed(seed)) < share
    mask[seed % 8, seed % 12] = True
    plan = SitePlan.build(mask, LEVELS, CONVS)
    more = dict(zip((*LEVELS, *CONVS), extra, strict=True))
    rows = {level: plan.rows(level) + more[level] for level in LEVELS}
    rings = {key: plan.ring[key].shape[0] + more[key] for key in CONVS}
    padded = plan.padded(rows, rings)

    for level in LEVELS:
        active = plan.active[level].tolist()
        assert padded.active[level].tolist() == repeated(active, rows[level])
        assert padded.rows(level) == rows[level]
        assert torch.equal(padded.active_mask(level), plan.active_mask(level))
        inverse = padded.inverse[level]
        assert inverse.shape == plan.inverse[level].shape and inverse.dtype is torch.int32
        for site, row in enumerate(inverse.tolist()):
            assert row == -1 if site not in active else padded.active[level][row] == site
    for key in CONVS:
        ring = padded.ring[key].tolist()
        assert ring == (repeated(plan.ring[key].tolist(), rings[key]) if plan.ring[key].numel() else [0] * rings[key])
        before: list[int | None] = [*plan.active[key.source].tolist(), *plan.ring[key].tolist(), None]
        after: list[int | None] = [*padded.active[key.source].tolist(), *ring, None]
        taps = padded.taps[key]
        assert taps.shape == (rows[key.target], plan.taps[key].shape[1]) and taps.dtype is torch.int64
        read_before = [[before[tap] for tap in line] for line in plan.taps[key].tolist()]
        read_after = [[after[tap] for tap in line] for line in taps.tolist()]
        assert read_after == read_before + read_before[-1:] * more[key.target]


def test_padding_by_nothing_changes_nothing() -> None:
    plan = SitePlan.build(make_mask("scattered", (8, 12)), LEVELS, CONVS)
    padded = pad(plan, lambda count: count)
    for tables in ("active", "ring", "taps"):
        for key, table in getattr(plan, tables).items():
            assert torch.equal(getattr(padded, tables)[key], table)


def test_a_plan_cannot_shrink() -> None:
    plan = SitePlan.build(make_mask("block", (8, 12)), LEVELS, CONVS)
    with pytest.raises(PlanError, match="cannot be padded"):
        pad(plan, lambda count: count - 1)


@pytest.mark.parametrize("kind", ["site", "scattered", "block", "border", "full"])
@pytest.mark.parametrize("name", ["sd15", "sdxl", "vae_decoder"])
@pytest.mark.parametrize("size", [bucket, lambda count: 2 * count + 3], ids=["bucket", "odd"])
def test_a_step_on_a_padded_plan_gives_the_same(name: str, kind: str, size: Callable[[int], int]) -> None:
    latent = (8, 24)
    compiled, base = compiled_model(name), base_run(name, "recorded", "cached", 2, latent)
    mask = make_mask(kind, latent, seed=3)
    inputs = edit_inputs(name, 2, latent, mask)
    plain, session = edited(compiled, base, inputs, mask)
    plan = session.plan
    assert plan is not None
    with compiled.edit(base.recording, mask) as session:
        session.plan = pad(plan, size)
        output = output_of(compiled(**inputs))
    assert_close(output, plain, torch.float32)
    kept = ~at_output(mask, output)
    assert torch.equal(output[..., kept], base.output[..., kept]), "outside the mask stands the recording"


def at_output(mask: Tensor, output: Tensor) -> Tensor:
    """The mask at the output's resolution."""
    factor = output.shape[-1] // mask.shape[-1]
    return mask.repeat_interleave(factor, 0).repeat_interleave(factor, 1)


@given(count=st.integers(1, 20000))
def test_buckets(count: int) -> None:
    size = bucket(count)
    assert size >= count and size % 16 == 0
    assert size - count < max(16, count / 8)
    assert bucket(size) == size, "a padded table is in its own bucket"
    assert size <= bucket(count + 1)


def test_there_are_few_buckets() -> None:
    assert bucket(0) == 16, "no table is empty: a step has no graph without rows"
    assert len({bucket(count) for count in range(1, 128 * 128 + 1)}) < 80
