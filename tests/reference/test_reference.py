"""The oracle against things simpler still: itself at the ends of its range, loops, and arithmetic by hand."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference import pinned
from tests.reference.active_sites import OracleError, spread_mask
from tests.reference.pinned import PinnedRun, run_pinned
from tests.support.zoo import ZOO, ZooModel

HEIGHT, WIDTH = 8, 16


@pytest.fixture(scope="module", params=sorted(ZOO))
def model(request: pytest.FixtureRequest) -> ZooModel:
    return ZOO[request.param]()


@pytest.fixture(scope="module")
def base_run(model: ZooModel) -> PinnedRun:
    inputs = model.make_inputs(2, HEIGHT, WIDTH)
    return PinnedRun(model.module, inputs, pin_inputs_of=model.dense_functions)


def some_mask() -> Tensor:
    mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    mask[2:5, 3:8] = True
    mask[7, 15] = True
    return mask


def edit_of(model: ZooModel, mask: Tensor) -> dict:
    return model.edit_inputs(model.make_inputs(2, HEIGHT, WIDTH), mask)


def dense(model: ZooModel, inputs: dict) -> Tensor:
    with torch.no_grad():
        output = model.module(**inputs)
    return output[0] if isinstance(output, tuple) else output


def test_the_oracle_does_not_import_what_it_judges():
    files = [path for path in Path(pinned.__file__).parent.glob("*.py") if not path.name.startswith("test_")]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text()))]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    ours = {name for name in imported if name.partition(".")[0] in ("fisedit_compiler", "tests", "benchmarks")}
    assert len(files) > 2 and all(name.startswith("tests.reference.") for name in ours)


def test_recording_computes_what_the_model_computes(model: ZooModel, base_run: PinnedRun):
    assert torch.equal(base_run.base_output, dense(model, model.make_inputs(2, HEIGHT, WIDTH)))


@pytest.mark.parametrize("norm", ["recorded", "incremental"])
def test_identity_edit_is_the_base(model: ZooModel, base_run: PinnedRun, norm):
    active = spread_mask(some_mask(), base_run.resolutions)
    again = base_run.replay(model.make_inputs(2, HEIGHT, WIDTH), active, norm=norm)
    if norm == "incremental":
        assert torch.equal(again, base_run.base_output)
    torch.testing.assert_close(again, base_run.base_output, rtol=1e-4, atol=1e-5)


def test_full_mask_is_the_dense_edit(model: ZooModel, base_run: PinnedRun):
    full = torch.ones(HEIGHT, WIDTH, dtype=torch.bool)
    edit = edit_of(model, full)
    active = spread_mask(full, base_run.resolutions)
    for attention in ("cached", "active"):
        output = base_run.replay(edit, active, norm="incremental", attention=attention)
        torch.testing.assert_close(output, dense(model, edit), rtol=1e-5, atol=1e-5)


def test_empty_mask_is_the_base(model: ZooModel, base_run: PinnedRun):
    empty = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    output = base_run.replay(edit_of(model, ~empty), spread_mask(empty, base_run.resolutions))
    assert torch.equal(output, base_run.base_output)


@pytest.mark.parametrize("norm", ["recorded", "incremental"])
@pytest.mark.parametrize("attention", ["cached", "active"])
def test_only_active_sites_change(model: ZooModel, base_run: PinnedRun, norm, attention):
    mask = some_mask()
    active = spread_mask(mask, base_run.resolutions)
    output = base_run.replay(edit_of(model, mask), active, norm=norm, attention=attention)
    inside = active[tuple(output.shape[-2:])]
    assert output.isfinite().all()
    assert torch.equal(output[..., ~inside], base_run.base_output[..., ~inside])
    assert (output[..., inside] != base_run.base_output[..., inside]).any(dim=1).all()


@pytest.mark.parametrize("norm", ["recorded", "incremental"])
@pytest.mark.parametrize("attention", ["cached", "active"])
def test_what_happens_outside_the_mask_cannot_leak_in(model: ZooModel, base_run: PinnedRun, norm, attention):
    """Another sample outside the mask changes nothing: every read of it goes through a boundary."""
    # At coarse levels an active site reads all the fine sites below it: the mask is made of whole blocks.
    blocks = spread_mask(some_mask(), [(HEIGHT // 4, WIDTH // 4)])[HEIGHT // 4, WIDTH // 4]
    active = spread_mask(blocks, base_run.resolutions | {(HEIGHT, WIDTH)})
    edit = edit_of(model, active[HEIGHT, WIDTH])
    noise = torch.randn(edit["sample"].shape, generator=torch.Generator().manual_seed(5))
    noisy = dict(edit, sample=torch.where(active[HEIGHT, WIDTH], edit["sample"], noise))
    outputs = [base_run.replay(inputs, active, norm=norm, attention=attention) for inputs in (edit, noisy)]
    assert torch.equal(*outputs)


def test_recorded_statistics_by_hand():
    """norm-silu-conv residual: the full-mask edit normalised by the base's mean and variance."""

    class Resnet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.GroupNorm(2, 4, eps=1e-3)
            nn.init.normal_(self.norm.weight)
            nn.init.normal_(self.norm.bias)
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, sample: Tensor) -> Tensor:
            return sample + self.conv(F.silu(self.norm(sample)))

    torch.manual_seed(0)
    module = Resnet().double()
    base, edit = torch.randn(2, 1, 4, 6, 6, dtype=torch.float64)
    full = torch.ones(6, 6, dtype=torch.bool)
    _, output = run_pinned(module, {"sample": base}, {"sample": 3 * edit + 1}, {(6, 6): full})
    with torch.no_grad():
        normal = torch.empty_like(edit)
        for channel in range(4):
            group = base[0, 2 * (channel // 2) : 2 * (channel // 2) + 2]
            scaled = (3 * edit[0, channel] + 1 - group.mean()) / (group.var(correction=0) + 1e-3).sqrt()
            normal[0, channel] = scaled * module.norm.weight[channel] + module.norm.bias[channel]
        expected = 3 * edit + 1 + module.conv(F.silu(normal))
        dense_edit = module(3 * edit + 1)
    torch.testing.assert_close(output, expected)
    assert (output - dense_edit).abs().max() > 0.1


def test_two_convolutions_against_loops():
    """Stride two, then repetition and a convolution: each active output site is summed tap by tap."""

    class TwoConvs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False)
            self.up = nn.Conv2d(3, 2, 3, padding=1, bias=False)

        def forward(self, sample: Tensor) -> Tensor:
            return self.up(F.interpolate(self.down(sample), scale_factor=2, mode="nearest"))

    torch.manual_seed(0)
    module = TwoConvs().double()
    base, edit = torch.randn(2, 1, 2, 8, 6, dtype=torch.float64)
    fine = torch.rand(8, 6) < 0.4
    coarse = torch.rand(4, 3) < 0.5  # on purpose not what the fine mask would suggest
    base_out, output = run_pinned(module, {"sample": base}, {"sample": edit}, {(8, 6): fine, (4, 3): coarse})

    def taps(read, weight: Tensor, y: int, x: int, height: int, width: int) -> Tensor:
        total = torch.zeros(weight.shape[0], dtype=weight.dtype)
        for dy, dx in itertools.product(range(3), range(3)):
            if 0 <= y + dy - 1 < height and 0 <= x + dx - 1 < width:
                total += weight[:, :, dy, dx] @ read(y + dy - 1, x + dx - 1)
        return total

    def pinned_input(y: int, x: int) -> Tensor:
        return (edit if fine[y, x] else base)[0, :, y, x]

    def pinned_coarse(y: int, x: int) -> Tensor:
        read = pinned_input if coarse[y, x] else lambda y, x: base[0, :, y, x]
        return taps(read, module.down.weight, 2 * y, 2 * x, 8, 6)

    expected = base_out.clone()
    with torch.no_grad():
        for y, x in itertools.product(range(8), range(6)):
            if fine[y, x]:
                repeated = lambda y, x: pinned_coarse(y // 2, x // 2)  # noqa: E731
                expected[0, :, y, x] = taps(repeated, module.up.weight, y, x, 8, 6)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("attention", ["cached", "active"])
def test_self_attention_against_loops(attention):
    class SelfAttention(nn.Module):
        def forward(self, sample: Tensor, text: Tensor) -> Tensor:
            tokens = sample.flatten(2).transpose(1, 2)[:, None]
            hidden = F.scaled_dot_product_attention(tokens, 2 * tokens, -tokens)
            hidden = hidden + F.scaled_dot_product_attention(hidden, text, text)
            return hidden[:, 0].transpose(1, 2).reshape(sample.shape)

    torch.manual_seed(0)
    base, edit = torch.randn(2, 1, 4, 3, 5, dtype=torch.float64)
    text = torch.randn(2, 1, 1, 7, 4, dtype=torch.float64)
    mask = torch.rand(3, 5) < 0.5
    _, output = run_pinned(
        SelfAttention(), {"sample": base, "text": text[0]}, {"sample": edit, "text": text[1]}, {(3, 5): mask},
        attention=attention,
    )  # fmt: skip
    sites = [site for site in itertools.product(range(3), range(5)) if attention == "cached" or mask[site]]
    memory = torch.stack([(edit if mask[site] else base)[0, :, site[0], site[1]] for site in sites])
    for y, x in mask.nonzero().tolist():
        scores = torch.softmax(2 * memory @ edit[0, :, y, x] / 2, dim=0)
        hidden = scores @ -memory
        hidden = hidden + torch.softmax(text[1, 0, 0] @ hidden / 2, dim=0) @ text[1, 0, 0]
        torch.testing.assert_close(output[0, :, y, x], hidden)


def test_dense_functions_read_a_pinned_map():
    model = ZOO["reflect"]()
    mask = some_mask()
    base, edit = (
        model.make_inputs(1, HEIGHT, WIDTH),
        model.edit_inputs(model.make_inputs(1, HEIGHT, WIDTH), mask),
    )
    run = PinnedRun(model.module, base, pin_inputs_of={"pad"})
    assert run.resolutions == {(HEIGHT, WIDTH)}
    with torch.no_grad():
        net = model.module
        before = F.silu(net.conv_in(base["sample"]))
        after = F.silu(net.conv_in(torch.where(mask, edit["sample"], base["sample"])))
        bordered = net.bordered(F.pad(torch.where(mask, after, before), (1, 1, 1, 1), mode="reflect"))
        hidden_base = before + F.silu(net.bordered(F.pad(before, (1, 1, 1, 1), mode="reflect")))
        hidden = torch.where(mask, after + F.silu(bordered), hidden_base)
        expected = torch.where(mask, net.conv_out(hidden), net.conv_out(hidden_base))
    torch.testing.assert_close(run.replay(edit, {(HEIGHT, WIDTH): mask}), expected)


def test_mistakes_are_named():
    model = ZOO["plain_conv"]()
    inputs = model.make_inputs(1, HEIGHT, WIDTH)
    run = PinnedRun(model.module, inputs)
    mask = some_mask()
    with pytest.raises(OracleError, match="4x8 map"):
        run.replay(inputs, {(HEIGHT, WIDTH): mask})
    with pytest.raises(OracleError, match="pass bool"):
        run.replay(inputs, {(HEIGHT, WIDTH): mask.float()})
    with pytest.raises(OracleError, match="no such semantics"):
        run.replay(inputs, {(HEIGHT, WIDTH): mask}, norm="batch")
    with pytest.raises(OracleError, match="boundary 0"):
        run.replay(model.make_inputs(2, HEIGHT, WIDTH), spread_mask(mask, run.resolutions))


def test_zoo_edits_stay_inside_the_mask_and_change_the_text(model: ZooModel):
    mask = some_mask()
    base = model.make_inputs(2, HEIGHT, WIDTH)
    edit = model.edit_inputs(base, mask)
    assert torch.equal(edit["sample"][..., ~mask], base["sample"][..., ~mask])
    assert (edit["sample"][..., mask] != base["sample"][..., mask]).all()
    if model.text_length:
        assert base["encoder_hidden_states"].shape[1] == model.text_length
        assert not torch.equal(edit["encoder_hidden_states"], base["encoder_hidden_states"])
        assert (dense(model, base) != dense(model, dict(edit, sample=base["sample"]))).all()


def test_zoo_is_deterministic_and_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    first, second = ZOO["sd15"](), ZOO["sd15"]()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first.module.parameters(), second.module.parameters()))
    assert torch.equal(first.make_inputs()["sample"], second.make_inputs()["sample"])
