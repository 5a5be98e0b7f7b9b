"""The cost model of block sizes: its formula, its packaged figures, what it chooses, and its refit."""

from __future__ import annotations

import json
import sys
from collections import Counter
from fractions import Fraction
from types import FrameType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import fit_block_costs
from benchmarks.fit_block_costs import CONFIGS, PACKAGE_FILE, Point, fit_terms, merged, unet_layers
from benchmarks.support.subjects import EMBEDDED_CONFIG, UNETS, scattered_mask, square_mask, thin_mask
from fisedit_compiler.geometry.block_costs import TERMS, Fitted, fits, read
from fisedit_compiler.geometry.block_sizes import BlockSizes, ConvLayer
from fisedit_compiler.geometry.conv_tables import ConvKey
from fisedit_compiler.geometry.patches import BLOCK_SIZES
from fisedit_compiler.geometry.site_plan import SitePlan

ONE, TWO = Fraction(1), Fraction(2)
KEY = ConvKey(ONE, ONE, (3, 3), padding=(1, 1))
DOWN = ConvKey(ONE, TWO, (3, 3), (2, 2), (1, 1))
POINTWISE = ConvKey(TWO, TWO, (1, 1))
LAYERS = (*[ConvLayer(KEY, 64, 64)] * 3, ConvLayer(DOWN, 64, 128), ConvLayer(POINTWISE, 128, 128))


def plan_of(mask: torch.Tensor) -> SitePlan:
    return SitePlan.build(mask, (), {layer.key for layer in LAYERS})


def bandwidth_only(size: int) -> Fitted:
    """Costs what it gathers and computes, with nothing in favour of a size."""
    return Fitted(size, "taps" if size == 1 else "patches", dict.fromkeys(TERMS, 1e-5))


@given(
    sizes=st.fixed_dictionaries(
        {name: st.integers(1, 64) for name in ("batch", "rows", "blocks", "outputs", "patch", "taps", "element")}
        | {name: st.integers(1, 1280) for name in ("channels", "out_channels")}
    ),
    more=st.sampled_from(["batch", "rows", "blocks", "channels", "out_channels", "taps", "patch"]),
)
def test_more_of_anything_costs_no_less(sizes: dict[str, int], more: str) -> None:
    for size in BLOCK_SIZES:
        for fitted in (bandwidth_only(size), fits("cpu")[size]):
            cost = fitted.microseconds(sizes)
            assert 0 <= cost <= fitted.microseconds({**sizes, more: sizes[more] + 1})


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_packaged_fits_are_complete_or_absent(device: str) -> None:
    known = fits(device)
    assert set(known) in (set(), set(BLOCK_SIZES))
    assert device != "cpu" or known
    for size, fitted in known.items():
        assert fitted.size == size and fitted.path in ("taps", "patches", "implicit")
        assert set(fitted.coefficients) == set(TERMS)
        assert all(value >= 0 for value in fitted.coefficients.values())


def test_the_packaged_file_says_what_it_was_measured_on() -> None:
    contents = json.loads(PACKAGE_FILE.read_text(encoding="utf-8"))
    for entry in contents["fits"]:
        assert entry["measured_on"]["machine"] and entry["measured_on"]["torch"] and entry["times"] > 20
        assert entry["median_error"] < 0.25, "a fit this bad chooses at random"
    for sizes in read(contents).values():
        assert set(sizes) == set(BLOCK_SIZES), "one path of each size is used"


def test_nobody_measured_means_size_one() -> None:
    sizes = BlockSizes(LAYERS)
    plan = plan_of(square_mask(0.3, 32, 32))
    assert sizes.choose(plan, 2, 4, "a device that nobody has") == {ONE: 1, TWO: 1}
    assert sizes.estimates(plan, 2, 4, "a device that nobody has") == {ONE: {}, TWO: {}}


def test_single_sites_are_computed_one_by_one_and_a_full_map_in_blocks() -> None:
    sizes = BlockSizes(LAYERS)
    fitted = {size: bandwidth_only(size) for size in BLOCK_SIZES}
    for known in (fitted, fits("cpu")):
        scattered = sizes.choose(plan_of(scattered_mask(0.02, 64, 64)), 2, 4, "cpu", known)
        assert scattered == {ONE: 1, TWO: 1}
    full = sizes.choose(plan_of(torch.ones(64, 64, dtype=torch.bool)), 2, 4, "cpu", fitted)
    assert full[ONE] == full[TWO] == 8, "nothing is wasted, and least is copied"


def test_estimates_are_sums_over_the_layers_of_a_level() -> None:
    plan = plan_of(square_mask(0.2, 32, 32))
    fitted = {4: bandwidth_only(4)}
    together = BlockSizes(LAYERS).estimates(plan, 2, 4, "cpu", fitted)
    alone = BlockSizes([ConvLayer(KEY, 64, 64)]).estimates(plan, 2, 4, "cpu", fitted)
    assert together[ONE][4] == pytest.approx(3 * alone[ONE][4])
    assert BlockSizes([ConvLayer(POINTWISE, 8, 8)]).levels == (), "a 1x1 convolution has no blocks"
    empty = plan_of(torch.zeros(32, 32, dtype=torch.bool))
    assert BlockSizes(LAYERS).choose(empty, 2, 4, "cpu") == {ONE: 1, TWO: 1}


def test_a_choice_takes_few_calls() -> None:
    """It is made for every new mask, so no formula is put together or simplified again."""
    layers = unet_layers(UNETS["sd21"])
    sizes = BlockSizes(layers)
    plan = SitePlan.build(square_mask(0.15, 96, 96), (), {layer.key for layer in layers})
    sizes.choose(plan, 2, 2, "cpu")
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        sizes.choose(plan, 2, 2, "cpu")
    finally:
        sys.setprofile(None)
    assert calls < 1000, calls


def test_the_listed_convolutions_are_those_of_the_compiled_model() -> None:
    from tests.support.compiled import model_and_compiled

    model, compiled = model_and_compiled()
    (program,) = compiled.programs
    assert Counter(unet_layers(model.module.config)) == Counter(program.layers)


def test_the_embedded_configuration_is_the_models() -> None:
    from fisedit_compiler.models import load_pipeline

    config = load_pipeline().unet.config
    for name, value in EMBEDDED_CONFIG.items():
        assert (list(value) if isinstance(value, tuple) else value) == (
            list(config[name]) if isinstance(value, tuple) else config[name]
        )


def test_a_fit_finds_the_coefficients_it_was_made_from() -> None:
    truth = {"call": 20.0, "gathered_bytes": 1e-4, "operations": 2e-6, "weight_bytes": 3e-4, "output_bytes": 0.0}
    generator = torch.Generator().manual_seed(0)
    points = []
    for number in range(60):
        draw = [int(torch.randint(1, 1000, (), generator=generator)) for _ in range(4)]
        features = dict(zip(("rows", "channels", "out_channels", "blocks"), draw, strict=True))
        features |= {"batch": 2, "outputs": 4, "patch": 16, "taps": 9, "element": 4}
        cost = Fitted(2, "patches", truth).microseconds(features)
        points.append(Point("patches", 2, features, cost * (50 if number % 20 == 7 else 1)))
    found = fit_terms(points)
    for name, value in truth.items():
        assert found[name] == pytest.approx(value, rel=0.05, abs=1e-8), "three disturbed times moved the fit"


def test_the_faster_path_is_used_and_other_devices_stay() -> None:
    features = {
        "batch": 2, "rows": 9, "blocks": 3, "outputs": 4, "patch": 16, "taps": 9, "channels": 8, "out_channels": 8,
        "element": 2,
    }  # fmt: skip
    points = [Point("patches", 2, features, 10.0), Point("implicit", 2, features, 5.0)]
    entries = fit_block_costs.fit(points, "cuda", {"machine": "a GPU"})
    assert {entry["path"]: entry["used"] for entry in entries} == {"patches": False, "implicit": True}
    known = {"fits": [{"device": "cpu", "size": 1, "path": "taps"}, {"device": "cuda", "size": 8, "path": "patches"}]}
    kept = merged(entries, known)["fits"]
    assert [(entry["device"], entry["size"]) for entry in kept] == [("cpu", 1), ("cuda", 2), ("cuda", 2)]


def test_refit_from_times_to_file(tmp_path, monkeypatch) -> None:
    tiny = {**EMBEDDED_CONFIG, "sample_size": 16, "block_out_channels": (8, 16)}
    monkeypatch.setitem(CONFIGS, "emoji-scenes", tiny)
    output, times = tmp_path / "costs.json", tmp_path / "times.json"
    arguments = ["--models", "emoji-scenes", "--repeats", "2", "--output", str(output), "--json", str(times)]
    contents = fit_block_costs.main(arguments)
    assert json.loads(output.read_text()) == contents
    assert {(entry["device"], entry["size"]) for entry in contents["fits"] if entry["device"] == "cpu"} == {
        ("cpu", size) for size in BLOCK_SIZES
    }
    assert set(read(contents)["cpu"]) == set(BLOCK_SIZES)
    assert all(row["microseconds"] > 0 for row in json.loads(times.read_text())["times"])


def test_masks_of_the_benchmark_are_what_they_are_called() -> None:
    compact, thin, scattered = square_mask(0.05, 64, 64), thin_mask(64, 64), scattered_mask(0.04, 64, 64)
    for mask in (compact, thin, scattered):
        assert mask.shape == (64, 64) and mask.dtype is torch.bool and 0.02 < mask.float().mean() < 0.15
    blocks = {mask: plan_of(mask).block_count(ONE, 8) / int(mask.sum()) for mask in (compact, thin, scattered)}
    assert blocks[compact] < blocks[thin] < blocks[scattered]
