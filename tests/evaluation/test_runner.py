"""Evaluations on a tiny pipeline: what is kept, what happens when something goes wrong, and going on afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fisedit_compiler.errors import ConfigError, FiseditError
from fisedit_compiler.evaluation.measures.measure import METRICS
from fisedit_compiler.evaluation.methods.bench import Bench
from fisedit_compiler.evaluation.pairs.pairs import EditPair
from fisedit_compiler.evaluation.results.store import Store
from fisedit_compiler.evaluation.runner import Evaluation, Progress, Runner, evaluate, sheet_pairs

METHODS = ["dense", "sparse", "sdedit@0.5"]


def lines_of(evaluation: Evaluation) -> list[int]:
    return [record["line"] for record in Store(evaluation.output).records()]


def counted(evaluation: Evaluation) -> list[int]:
    """Run it; the lines of the pairs that really ran."""
    ran: list[int] = []
    evaluate(evaluation, Progress(pair=lambda pair: ran.append(pair.line)))
    return ran


def test_every_pair_has_a_record_with_all_figures_and_its_pictures(evaluation: Evaluation) -> None:
    evaluate(evaluation)
    store = Store(evaluation.output)
    records = store.records()
    assert [(record["line"], record["seed"], record["status"]) for record in records] == [
        (1, 1, "done"), (2, 5, "done"), (3, 3, "done"),
    ]  # fmt: skip
    for record in records:
        assert list(record["methods"]) == METHODS
        for figures in record["methods"].values():
            assert {metric.name for metric in METRICS} <= set(figures)
        assert record["methods"]["dense"]["psnr_inside_to_dense"] in (100.0, None)
        assert record["methods"]["dense"]["dense_calls"] == evaluation.steps
        assert set(store.features(record["line"])) == {"base", *METHODS}
        assert all(store.image(record["line"], name) is not None for name in ("base", "mask", *METHODS))
    assert records[2]["truth"] is None, "the pair has no region"
    assert not list(evaluation.output.rglob(".*")), "temporary files were left"


def test_the_same_run_gives_the_same_figures(evaluation: Evaluation, tmp_path: Path) -> None:
    other = replace(evaluation, output=tmp_path / "other")
    evaluate(evaluation)
    evaluate(other)
    for first, second in zip(Store(evaluation.output).records(), Store(other.output).records(), strict=True):
        for name in METHODS:
            timeless = ({**record["methods"][name], "seconds": 0} for record in (first, second))
            assert next(timeless) == next(timeless)


def test_an_interrupted_run_goes_on_where_it_stopped(
    evaluation: Evaluation, interrupt: Callable[..., Callable[[], None]], bench: Bench
) -> None:
    mend = interrupt(2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        evaluate(evaluation)
    assert lines_of(evaluation) == [1]
    assert bench.pipe.unet is bench.original
    mend()
    assert counted(evaluation) == [2, 3]
    assert counted(evaluation) == []


def test_a_failing_pair_is_recorded_and_tried_again(
    evaluation: Evaluation, interrupt: Callable[..., Callable[[], None]]
) -> None:
    mend = interrupt(1, RuntimeError("out of luck"))
    told: list[tuple[int, str]] = []
    evaluate(evaluation, Progress(finished=lambda pair, error: told.append((pair.line, error))))
    assert told == [(1, "RuntimeError: out of luck"), (2, ""), (3, "")]
    assert Store(evaluation.output).record(1) == {
        "line": 1,
        "pair": {"input": "a cat, red background", "edit": "dog", "output": "a dog, red background",
                 "region": [0.0, 0.0, 1.0, 1.0]},
        "seed": 1,
        "status": "failed",
        "error": "RuntimeError: out of luck",
    }  # fmt: skip
    mend()
    assert counted(evaluation) == [1]


def test_a_damaged_record_is_run_again(evaluation: Evaluation) -> None:
    evaluate(evaluation)
    (evaluation.output / "pairs" / "000002.json").write_text('{"line": 2, "sta')
    assert counted(evaluation) == [2]


def test_shards_share_the_pairs(evaluation: Evaluation) -> None:
    assert counted(replace(evaluation, shard=(2, 2))) == [2]
    assert counted(replace(evaluation, shard=(1, 2))) == [1, 3]
    assert lines_of(evaluation) == [1, 2, 3]


def test_a_limit_can_be_raised(evaluation: Evaluation) -> None:
    assert counted(replace(evaluation, limit=1)) == [1]
    assert counted(replace(evaluation, limit=2)) == [2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 7}, "steps: 6 there, 7 now"),
        ({"methods": ("blend",)}, "methods: dense, sparse, sdedit@0.5 there, dense, sparse, blend now"),
        ({"seed": 4}, "seed: 0 there, 4 now"),
        ({"clip": Path("other")}, "clip: emoji-clip there, other now"),
    ],
)
def test_another_configuration_is_refused(evaluation: Evaluation, changes: dict[str, Any], words: str) -> None:
    Store(evaluation.output).open(_configuration(evaluation))
    with pytest.raises(ConfigError, match=words) as caught:
        evaluate(replace(evaluation, **changes))
    assert "--fresh" in str(caught.value) and "--output" in str(caught.value)


def _configuration(evaluation: Evaluation) -> dict[str, Any]:
    from fisedit_compiler.evaluation.methods.registry import choose_methods
    from fisedit_compiler.evaluation.pairs.pairs import read_pairs

    return evaluation.configuration(choose_methods(evaluation.methods), read_pairs(evaluation.pairs))


def test_other_pairs_are_refused(evaluation: Evaluation) -> None:
    Store(evaluation.output).open(_configuration(evaluation))
    evaluation.pairs.write_text(evaluation.pairs.read_text().replace("fox", "owl"))
    with pytest.raises(ConfigError, match="pairs sha256"):
        evaluate(evaluation)


def test_clearing_deletes_results_and_nothing_else(evaluation: Evaluation) -> None:
    store = Store(evaluation.output)
    store.open(_configuration(evaluation))
    store.write({"line": 1, "status": "done"}, {})
    (evaluation.output / "notes.txt").write_text("mine")
    store.clear()
    assert [path.name for path in evaluation.output.iterdir()] == ["notes.txt"]
    stranger = evaluation.output.parent / "stranger"
    (stranger / "images").mkdir(parents=True)
    Store(stranger).clear()
    assert (stranger / "images").is_dir()


def test_an_output_that_cannot_be_written_is_named(evaluation: Evaluation, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FiseditError, match="choose another --output"):
        evaluate(replace(evaluation, output=tmp_path / "file"))


def test_wrong_lines_are_named_and_the_rest_runs(evaluation: Evaluation) -> None:
    good = evaluation.pairs.read_text().splitlines()[0]
    evaluation.pairs.write_text(f"nonsense\n{good}\n" + json.dumps({"input": "a", "edit": "", "output": "b " * 40}))
    file = evaluate(evaluation)
    assert [item.line for item in file.rejected] == [1, 3]
    assert lines_of(evaluation) == [2]
    facts = json.loads((evaluation.output / "run.json").read_text())
    assert [text.split(": ")[0] for text in facts["rejected"]] == [f"{evaluation.pairs}:1", f"{evaluation.pairs}:3"]


def test_a_file_without_a_usable_pair_says_why(evaluation: Evaluation) -> None:
    evaluation.pairs.write_text("nonsense\n")
    with pytest.raises(FiseditError, match=r"no pair to run.*\n.*:1: not JSON"):
        evaluate(evaluation)


def test_without_images_only_the_contact_sheets_are_kept(
    evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fisedit_compiler.evaluation.runner.SHEET_PAIRS", 1)
    monkeypatch.setattr("fisedit_compiler.evaluation.runner.sheet_pairs", lambda pairs: sheet_pairs(pairs, 1))
    evaluate(replace(evaluation, images=False))
    assert [path.name for path in (evaluation.output / "images").iterdir()] == ["000001"]


def test_the_contact_sheet_has_every_kind() -> None:
    kinds = ["object"] * 30 + ["background"] * 2 + ["size"]
    pairs = [EditPair("a", "", "b", kind=kind, line=line) for line, kind in enumerate(kinds, start=1)]
    chosen = sheet_pairs(pairs, 6)
    assert [pair.line for pair in chosen] == [1, 2, 3, 31, 32, 33]
    assert sheet_pairs(pairs[:3], 6) == pairs[:3]


def test_features_of_another_extractor_are_kept_instead(
    evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    original = Runner.__init__

    def with_extractor(self: Runner, *arguments: Any) -> None:
        original(self, *arguments, lambda image: torch.tensor([float(image.width)]))

    monkeypatch.setattr(Runner, "__init__", with_extractor)
    evaluate(replace(evaluation, limit=1))
    assert Store(evaluation.output).features(1)["sparse"].tolist() == [32.0]


def test_the_command_repeats_the_run(evaluation: Evaluation) -> None:
    assert evaluation.command() == (
        "fisedit eval pairs.jsonl --output out --methods dense --methods sparse --methods sdedit@0.5 --steps 6"
    )
    plain = Evaluation(Path("p.jsonl"), Path("o"), device="cuda", suite="approximations", model=Path("a b"))
    assert plain.command() == "fisedit eval p.jsonl --output o --model 'a b' --suite approximations --device cuda"
