"""Above the break-even an edit's calls run densely: when, what they return, what they record, and that they say so."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fisedit_compiler import Editor, SparseModule, SparsifyConfig, sparsify
from fisedit_compiler.errors import RecordingError
from fisedit_compiler.geometry.break_even import NEVER, break_even, figures
from fisedit_compiler.kernels.tolerances import assert_close
from fisedit_compiler.runtime.calls.binding import Binder
from fisedit_compiler.runtime.execution.executable import Executable
from fisedit_compiler.runtime.sessions.fallback import dense_reason
from tests.support.compiled import HEIGHT, STEPS, WIDTH, box, denoise, model_and_compiled, other_text
from tests.support.tiny_pipeline import make_tiny_pipeline
from tests.support.zoo import ZOO, Inputs

SMALL = box(4, 6, 12, 16)
LARGE = box(0, 2, HEIGHT, WIDTH)  # 91.7 % of the sites
FULL = torch.ones(HEIGHT, WIDTH, dtype=torch.bool)
MODELS = ("sd15", "sdxl", "pooled", "reflect", "vae_decoder")


def output(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def outside(mask: Tensor, result: Tensor) -> Tensor:
    """The inactive sites at the output's resolution, which a decoder doubles."""
    factor = result.shape[-2] // mask.shape[-2]
    return ~mask.repeat_interleave(factor, 0).repeat_interleave(factor, 1)


def record(compiled: SparseModule, inputs: Inputs) -> tuple[Any, Tensor]:
    with compiled.record() as recording:
        base = output(compiled(**inputs))
    return recording, base


@pytest.fixture
def forbidden_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """No sparse program may run."""

    def step(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a sparse program ran")

    monkeypatch.setattr(Executable, "step", step)


# -- results ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_above_it_is_the_dense_run_inside_and_the_recording_outside(
    name: str, recorded: bool, forbidden_step: None
) -> None:
    model, compiled = model_and_compiled(name, dense_above=None)
    inputs = model.make_inputs(2, HEIGHT, WIDTH)
    edited = model.edit_inputs(inputs, LARGE)
    recording, base = record(compiled, inputs)
    with compiled.edit(recording, LARGE, record=recorded) as session:
        result = output(compiled(**edited))
    with torch.no_grad():
        dense = output(model.module(**edited))
    kept = outside(LARGE, result)
    assert [kind for kind, _ in session.timings] == ["dense"]
    assert kept.any() and not torch.equal(dense[..., kept], base[..., kept])
    assert torch.equal(result[..., kept], base[..., kept])
    assert torch.equal(result[..., ~kept], dense[..., ~kept])


@pytest.mark.parametrize("recorded", [False, True])
def test_a_full_mask_is_the_dense_run_itself(recorded: bool, forbidden_step: None) -> None:
    model, compiled = model_and_compiled(dense_above=None)
    inputs = model.make_inputs(2, HEIGHT, WIDTH)
    recording, _ = record(compiled, inputs)
    edited = model.edit_inputs(inputs, FULL)
    with compiled.edit(recording, FULL, record=recorded) as session:
        result = output(compiled(**edited))
    with torch.no_grad():
        assert torch.equal(result, output(model.module(**edited)))
    assert session.plan is not None and session.plan.is_full


@pytest.mark.parametrize("norm", ["recorded", "incremental"])
def test_a_full_mask_that_never_falls_back_is_still_sparse(norm: str) -> None:
    model, compiled = model_and_compiled(norm=norm, dense_above=1.0)
    inputs = model.make_inputs(2, HEIGHT, WIDTH)
    recording, _ = record(compiled, inputs)
    edited = model.edit_inputs(inputs, FULL)
    with compiled.edit(recording, FULL) as session:
        result = output(compiled(**edited))
    assert [kind for kind, _ in session.timings] == ["sparse"]
    assert session.fallback is None
    if norm == "incremental":
        assert_close(result, output(model.module(**edited)), torch.float32)


def test_below_it_is_the_sparse_run() -> None:
    model, compiled = model_and_compiled(dense_above=None)
    _, never = model_and_compiled()
    inputs = model.make_inputs(2, HEIGHT, WIDTH)
    results = []
    for module in (compiled, never):
        recording, _ = record(module, inputs)
        with module.edit(recording, SMALL) as session:
            results.append(output(module(**model.edit_inputs(inputs, SMALL))))
        assert [kind for kind, _ in session.timings] == ["sparse"]
        assert session.fallback is None
    assert torch.equal(*results)


def test_an_empty_mask_makes_no_call(forbidden_step: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, compiled = model_and_compiled(dense_above=0.0)
    inputs = model.make_inputs(2, HEIGHT, WIDTH)
    recording, base = record(compiled, inputs)
    monkeypatch.setattr(Binder, "_call_module", lambda *_, **__: pytest.fail("an empty mask must not run the model"))
    with compiled.edit(recording, torch.zeros_like(FULL), record=True) as session:
        assert torch.equal(output(compiled(**other_text(inputs))), base)
    assert [kind for kind, _ in session.timings] == ["skipped"]


def test_outputs_that_are_not_spatial_are_the_dense_ones(forbidden_step: None) -> None:
    class MapAndMean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3, padding=1)
            self.head = nn.Linear(5, 3)

        def forward(self, sample: Tensor, vector: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            hidden = self.conv(sample)
            return hidden, self.head(vector), hidden.flatten(2).transpose(1, 2)

    module = MapAndMean().eval()
    inputs = {"sample": torch.randn(2, 4, HEIGHT, WIDTH), "vector": torch.randn(2, 5)}
    compiled = sparsify(module, SparsifyConfig(multiple=1, cache=False), example_inputs=inputs)
    with compiled.record() as recording:
        base = compiled(**inputs)
    edited = {"sample": torch.where(LARGE, inputs["sample"] + 1, inputs["sample"]), "vector": torch.randn(2, 5)}
    with torch.no_grad():
        dense = module(**edited)
    for recorded in (False, True):
        with compiled.edit(recording, LARGE, record=recorded):
            image, vector, tokens = compiled(**edited)
        assert torch.equal(vector, dense[1])
        assert torch.equal(image, torch.where(LARGE, dense[0], base[0]))
        assert torch.equal(tokens, torch.where(LARGE.flatten()[:, None], dense[2], base[2]))


def test_the_input_outside_the_mask_is_checked_all_the_same() -> None:
    model, compiled = model_and_compiled(dense_above=None)
    inputs = model.make_inputs(2, HEIGHT, WIDTH)
    recording, _ = record(compiled, inputs)
    with pytest.raises(RecordingError, match="outside the mask"), compiled.edit(recording, LARGE):
        compiled(**{**inputs, "sample": inputs["sample"] + 1})


# -- recordings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["recorded", "incremental"])
def test_a_recorded_fallback_is_a_recording_like_any_other(norm: str) -> None:
    model, compiled = model_and_compiled(norm=norm, dense_above=None)
    inputs = model.make_inputs(2, HEIGHT, WIDTH)
    with compiled.record() as recording:
        base = denoise(compiled, inputs)
    with compiled.edit(recording, LARGE) as session:
        plain = denoise(compiled, other_text(inputs))
    assert [kind for kind, _ in session.timings] == ["dense"] * STEPS
    with compiled.edit(recording, LARGE, record=True) as session:
        first = denoise(compiled, other_text(inputs))
    assert torch.equal(first, plain)
    assert torch.equal(first[..., ~LARGE], base[..., ~LARGE])
    result = session.result
    assert result is not None and result.complete and result.num_calls == STEPS
    assert list(result.calls[0].slots) == list(recording.calls[0].slots)

    # An empty edit returns what the fallback returned.
    with compiled.edit(result, torch.zeros_like(FULL)):
        assert torch.equal(denoise(compiled, inputs), first)
    # Sparsely: the same text reproduces it, and another text moves nothing outside the second mask.
    with compiled.edit(result, SMALL) as again:
        assert_close(denoise(compiled, other_text(inputs)), first, torch.float32)
    assert [kind for kind, _ in again.timings] == ["sparse"] * STEPS
    with compiled.edit(result, SMALL):
        second = denoise(compiled, other_text(inputs, seed=2))
    assert torch.equal(second[..., ~SMALL], first[..., ~SMALL])
    assert not torch.equal(second[..., SMALL], first[..., SMALL])
    # And densely once more.
    other = box(0, 0, HEIGHT, WIDTH - 2)
    with compiled.edit(result, other, record=True):
        third = denoise(compiled, other_text(inputs, seed=3))
    assert torch.equal(third[..., ~other], first[..., ~other])


def test_callers_may_write_to_what_a_recorded_fallback_returned() -> None:
    model, compiled = model_and_compiled(dense_above=None)
    inputs = model.make_inputs(2, HEIGHT, WIDTH)
    recording, _ = record(compiled, inputs)
    for mask in (LARGE, FULL):
        with compiled.edit(recording, mask, record=True) as session:
            result = output(compiled(**other_text(inputs)))
            kept = result.clone()
            result.zero_()
        assert session.result is not None
        with compiled.edit(session.result, torch.zeros_like(FULL)):
            assert torch.equal(output(compiled(**inputs)), kept)
        storages = {slot.untyped_storage().data_ptr() for slot in session.result.calls[0].slots.values()}
        assert len(storages) == len(session.result.calls[0].slots)


# -- the limit --------------------------------------------------------------------------------------


def test_the_limit_is_what_lies_strictly_above_it_after_dilation() -> None:
    half = box(0, 0, HEIGHT, WIDTH // 2)
    below_half = box(0, 0, HEIGHT, WIDTH // 2 - 1)

    def falls_back(mask: Tensor, **options: Any) -> bool:
        return dense_reason(mask, SparsifyConfig(**options), "cpu") is not None

    assert not falls_back(half, dense_above=0.5)
    assert falls_back(half, dense_above=0.499)
    assert not falls_back(below_half, dense_above=0.499)
    assert falls_back(below_half, dense_above=0.499, dilation=1)
    assert falls_back(SMALL, dense_above=0.0) and falls_back(SMALL, dense_above=0)
    assert not falls_back(torch.zeros_like(SMALL), dense_above=0.0)
    assert not falls_back(FULL, dense_above=1.0)
    assert falls_back(FULL, dense_above=0.999)


def test_a_dilated_mask_is_pinned_outside_the_dilation(forbidden_step: None) -> None:
    model, compiled = model_and_compiled(dense_above=0.1, dilation=2)
    inputs = model.make_inputs(2, HEIGHT, WIDTH)
    grown = box(2, 4, 14, 18)
    edited = model.edit_inputs(inputs, SMALL)
    recording, base = record(compiled, inputs)
    with compiled.edit(recording, SMALL):
        result = output(compiled(**edited))
    with torch.no_grad():
        dense = output(model.module(**edited))
    assert torch.equal(result, torch.where(grown, dense, base))


def test_the_default_is_the_measured_break_even() -> None:
    measured = break_even("cpu", "eager")
    assert 0.0 < measured < 1.0
    rows = torch.arange(1000).reshape(1000, 1).expand(1000, 10)
    for area, expected in ((measured - 0.002, False), (measured + 0.002, True)):
        assert (dense_reason(rows < round(1000 * area), SparsifyConfig(), "cpu") is not None) is expected


def test_the_break_even_is_that_of_what_really_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    inductor = SparsifyConfig(backend="inductor")
    assert inductor.backend_on("cuda") == "inductor"
    assert inductor.backend_on("cpu") == "eager"
    assert SparsifyConfig(backend="inductor", norm="incremental").backend_on("cuda") == "inductor"
    assert SparsifyConfig().backend_on("cuda") == "inductor"
    assert SparsifyConfig(backend="eager").backend_on("cuda") == "eager"
    assert break_even("meta", "eager") == NEVER
    assert dense_reason(FULL, SparsifyConfig(), "meta") is None
    monkeypatch.setattr("fisedit_compiler.runtime.sessions.fallback.break_even", lambda kind, backend: 0.5)
    assert "cpu/eager" in str(dense_reason(FULL, inductor, "cpu"))
    assert "cuda/inductor" in str(dense_reason(FULL, inductor, "cuda:0"))


def test_every_figure_is_a_share() -> None:
    assert figures()
    assert all(0.0 < figure <= 1.0 for figure in figures().values())


def test_the_limit_is_no_part_of_what_is_compiled_or_recorded() -> None:
    assert SparsifyConfig(dense_above=0.2).program_key() == SparsifyConfig().program_key()
    model, never = model_and_compiled()
    inputs = model.make_inputs(2, HEIGHT, WIDTH)
    recording, base = record(never, inputs)
    _, sometimes = model_and_compiled(dense_above=None)
    with sometimes.edit(recording, LARGE):
        assert torch.equal(output(sometimes(**inputs))[..., ~LARGE], base[..., ~LARGE])


# -- saying so --------------------------------------------------------------------------------------


def test_it_says_so_once_and_from_the_start(caplog: pytest.LogCaptureFixture) -> None:
    model, compiled = model_and_compiled(dense_above=None)
    inputs = model.make_inputs(2, HEIGHT, WIDTH)
    with compiled.record() as recording:
        denoise(compiled, inputs)
    expected = (
        f"91.7% of the sites are active, above the break-even of {break_even('cpu', 'eager'):.1%} on cpu/eager: "
        "calls run densely"
    )
    with caplog.at_level(logging.INFO, "fisedit_compiler"), compiled.edit(recording, LARGE) as session:
        assert session.fallback == expected
        denoise(compiled, inputs)
    assert caplog.messages == [expected]
    assert session.fallback == expected


def test_a_limit_of_the_users_is_named() -> None:
    assert dense_reason(SMALL, SparsifyConfig(dense_above=0.1), "cpu") == (
        "20.8% of the sites are active, above SparsifyConfig.dense_above=10.0%: calls run densely"
    )


def test_another_mask_is_judged_anew() -> None:
    model, compiled = model_and_compiled(dense_above=None)
    inputs = model.make_inputs(2, HEIGHT, WIDTH)
    with compiled.record() as recording:
        for _ in range(3):
            compiled(**inputs)
    with compiled.edit(recording) as session:
        assert session.fallback is None
        compiled(**other_text(inputs))
        session.set_mask(LARGE)
        assert session.fallback is not None
        compiled(**inputs)
        session.set_mask(SMALL)
        assert session.fallback is None
        compiled(**inputs)
    assert [kind for kind, _ in session.timings] == ["dense", "dense", "sparse"]


def test_the_editors_report_says_so() -> None:
    with Editor(make_tiny_pipeline()) as editor:
        base = editor.generate("a cat", seed=3, num_inference_steps=4)
        mask = box(0, 0, 16, 15, 16, 16)
        edit = editor.edit(base, "a dog", mask=mask)
        assert edit.unchanged_outside
        assert (edit.report.dense_calls, edit.report.sparse_calls) == (4, 0)
        assert "93.8% of the sites are active, above the break-even" in edit.report.note
        assert edit.report.note in str(edit.report)
        small = editor.edit(edit, "a fox", mask=box(2, 2, 6, 6, 16, 16))
        assert small.unchanged_outside
        assert (small.report.sparse_calls, small.report.note) == (4, "")


# -- on a GPU ---------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_on_a_gpu_the_dense_call_is_compiled_and_pinned(caplog: pytest.LogCaptureFixture) -> None:
    model = ZOO["sd21"]()
    module = model.module.to("cuda", torch.float16)
    state = dict(vars(module))
    compiled = sparsify(module, SparsifyConfig(backend="inductor", dense_above=0.5))

    def cast(inputs: Inputs) -> Inputs:
        def move(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to("cuda", torch.float16 if value.is_floating_point() else value.dtype)

        return {name: move(value) for name, value in inputs.items()}

    mask = LARGE.cuda()
    inputs = cast(model.make_inputs(2, HEIGHT, WIDTH))
    with compiled.record() as recording:
        bases = [output(compiled(**inputs)) for _ in range(3)]
    edits = [cast(model.edit_inputs(model.make_inputs(2, HEIGHT, WIDTH), LARGE, seed)) for seed in range(3)]
    with caplog.at_level(logging.INFO, "fisedit_compiler"), compiled.edit(recording, mask) as session:
        results = [output(compiled(**edit)) for edit in edits]
    assert "dense_above=50.0%" in str(session.fallback)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("fisedit_compiler")]
    for result, base, edit in zip(results, bases, edits, strict=True):
        with torch.no_grad():
            dense = output(module(**edit))
        assert torch.equal(result[..., ~mask], base[..., ~mask])
        assert_close(result[..., mask], dense[..., mask], torch.float16)
    assert vars(module) == state, "the original was patched"
    with compiled.edit(recording, torch.ones_like(mask), record=True) as session:
        again = [output(compiled(**edit)) for edit in edits]
    assert_close(again[0][..., mask], results[0][..., mask], torch.float16)
    assert session.result is not None and session.result.num_calls == 3
