"""The registry, and what sets the methods apart, on a tiny pipeline."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from evaluation_tools import STEPS

from fisedit_compiler.errors import ConfigError
from fisedit_compiler.evaluation.methods.bench import Bench, Case, KeepOutside, NotApplicable, Outcome
from fisedit_compiler.evaluation.methods.methods import drawn_mask, local_mask
from fisedit_compiler.evaluation.methods.registry import choose_methods, method, method_names
from fisedit_compiler.evaluation.pairs.objects import GroundTruth
from fisedit_compiler.evaluation.pairs.pairs import EditPair
from tests.support.tiny_pipeline import PinnedSession, PinnedUNet, make_tiny_pipeline

PAIR = EditPair("a cat", "dog", "a dog", region=(0.0, 0.0, 1.0, 0.5), kind="object")


def run(name: str, bench: Bench, case: Case) -> Outcome:
    (chosen,) = (item for item in choose_methods([name]) if item.name == name)
    return chosen.run(bench, case)


def make_case(bench: Bench, mask: torch.Tensor | None = None, pair: EditPair = PAIR) -> Case:
    """A case whose "automatic" mask is given: random weights change a little everywhere."""
    mask = torch.zeros(16, 16, dtype=torch.bool) if mask is None else mask
    if not mask.any():
        mask[4:10, 2:9] = True
    with bench.editor() as editor:
        base = editor.generate(pair.input, seed=3, num_inference_steps=STEPS)
        sparse = editor.edit(base, pair.output, mask=mask, record=False)
    return Case(pair, base, bench.run(pair.output, base.settings), sparse, None)


@pytest.fixture
def case(bench: Bench) -> Case:
    return make_case(bench)


def pixels(outcome: Any) -> np.ndarray:
    return np.asarray(outcome.image).astype(int)


def test_names_expand_and_the_references_come_first() -> None:
    assert [item.name for item in choose_methods(["p2p", "sdedit@0.25", "dense"])] == [
        "dense", "sparse", "p2p@0.2", "p2p@0.4", "p2p@0.8", "sdedit@0.25",
    ]  # fmt: skip


def test_suites_hold_what_is_compared() -> None:
    methods = {item.family for item in choose_methods(suite="methods")}
    assert methods == {"dense", "sparse", "sparse-given", "blend", "sdedit", "p2p"}
    approximations = [item.name for item in choose_methods(suite="approximations")]
    assert approximations[:2] == ["dense", "sparse"]
    assert set(approximations[2:]) == {
        "blend", "default", "recorded", "active", "recorded-active", "block-1", "block-2", "block-4", "block-8",
        "pinned",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("names", "suite", "words"),
    [
        (["diffedit"], "methods", "unknown method 'diffedit'; choose from dense, sparse"),
        (["blend@0.5"], "methods", "'blend' has no parameter"),
        (["sdedit@two"], "methods", "above 0 and up to 1"),
        (["sdedit@0"], "methods", "above 0 and up to 1"),
        (["sdedit@"], "methods", "above 0 and up to 1"),
        ([], "everything", "unknown suite 'everything'"),
    ],
)
def test_wrong_names_are_told_the_right_ones(names: list[str], suite: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        choose_methods(names, suite)


def test_a_name_is_given_once() -> None:
    assert "dense" in method_names()
    with pytest.raises(ConfigError, match="already"):
        method("dense", "again")(lambda bench, case: case.dense)


def test_the_original_is_back_after_every_method(bench: Bench, case: Case) -> None:
    for name in ("sparse-given", "blend", "sdedit@0.5"):
        run(name, bench, case)
        assert bench.pipe.unet is bench.original


def test_blending_keeps_the_base_outside_and_the_dense_run_under_a_full_mask(bench: Bench, case: Case) -> None:
    full = KeepOutside(case.base.latents, torch.ones(16, 16, dtype=torch.bool))
    assert np.array_equal(pixels(bench.run("a dog", case.base.settings, full)), pixels(case.dense))
    seen: list[torch.Tensor] = []
    keep = KeepOutside(case.base.latents, case.sparse.mask)

    def watched(*arguments: Any) -> dict[str, torch.Tensor]:
        seen.append(keep(*arguments)["latents"])
        return {"latents": seen[-1]}

    bench.run("a dog", case.base.settings, watched)
    outside = ~case.sparse.mask
    assert len(seen) == STEPS
    assert all(torch.equal(a[..., outside], b[..., outside]) for a, b in zip(seen, case.base.latents, strict=True))
    outcome = run("blend", bench, case)
    assert outcome.count("dense") == STEPS
    assert torch.equal(outcome.mask, case.sparse.mask)


def test_sdedit_runs_the_last_share_of_the_steps(bench: Bench, case: Case) -> None:
    weak, strong = run("sdedit@0.5", bench, case), run("sdedit@1", bench, case)
    assert (weak.count("dense"), strong.count("dense")) == (STEPS // 2, STEPS)
    assert not np.array_equal(pixels(weak), pixels(strong))
    assert np.array_equal(pixels(weak), pixels(run("sdedit@0.5", bench, case)))


def test_a_drawn_mask_is_the_object_with_a_margin_or_the_region(bench: Bench, case: Case) -> None:
    region = drawn_mask(case)
    assert region[:, :8].all() and not region[:, 8:].any()
    truth = np.zeros((32, 32), dtype=bool)
    truth[16:18, 16:18] = True
    mask = drawn_mask(Case(PAIR, case.base, case.dense, case.sparse, GroundTruth(truth, "objects")))
    assert mask[8, 8] and mask[8, 10] and mask[6, 8] and not mask[8, 11]
    outcome = run("sparse-given", bench, case)
    assert torch.equal(outcome.mask, region)
    assert outcome.count("sparse") == STEPS


def test_what_has_no_mask_of_its_own_says_so(bench: Bench) -> None:
    everywhere = make_case(
        bench, torch.ones(16, 16, dtype=torch.bool), EditPair("a cat", "", "a dog", kind="background")
    )
    with pytest.raises(NotApplicable, match="whole picture"):
        local_mask(everywhere)
    with pytest.raises(NotApplicable, match="nobody would draw"):
        drawn_mask(everywhere)


def test_attention_is_replaced_in_the_first_calls(bench: Bench, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    plain = PinnedUNet.record

    def record(self: Any, maps: int = 0) -> Any:
        seen["maps"] = maps
        return plain(self)

    monkeypatch.setattr(PinnedUNet, "record", record)
    monkeypatch.setattr(
        PinnedSession,
        "reuse_maps",
        lambda self, columns: seen.update(columns=columns, recording=self.base),
        raising=False,
    )
    outcome = run("p2p@0.5", bench, case)
    assert seen["maps"] == STEPS // 2
    assert seen["recording"].num_calls == STEPS
    unguided, guided = seen["columns"]
    assert unguided.eq(-1).all()
    # "cat" was replaced by one word of as many tokens, so every token has a counterpart.
    assert guided.tolist() == list(range(len(guided)))
    assert outcome.count("dense") == STEPS


def test_variants_differ_by_their_approximation_only() -> None:
    """The real compiler: packing and block size change nothing, other statistics do."""
    bench = Bench(make_tiny_pipeline())
    case = make_case(bench)
    default = run("default", bench, case)
    assert default.count("sparse") == STEPS
    for name in ("pinned", "block-4"):
        outcome = run(name, bench, case)
        assert np.abs(pixels(outcome) - pixels(default)).max() <= 1, name
        assert torch.equal(outcome.mask, case.sparse.mask)
    assert np.abs(pixels(run("recorded", bench, case)) - pixels(default)).max() > 0
    replaced = [pixels(run(f"p2p@{share}", bench, case)) for share in ("0.2", "1")]
    assert np.abs(replaced[0] - replaced[1]).max() > 0
    assert bench.pipe.unet is bench.original
