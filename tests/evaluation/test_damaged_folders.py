"""A folder of results whose files are damaged: the report is of what is sound, and the next run mends the rest."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from fisedit_compiler.evaluation.command import check_lines, summary_table, write_report
from fisedit_compiler.evaluation.results.store import Store

METHODS = ["dense", "sparse", "sdedit@0.5"]
CONFIG = {
    "model": "m", "clip": "c", "features": "f", "methods": METHODS, "steps": 25, "guidance": 5.0, "dtype": "float32",
    "backend": "eager",
}  # fmt: skip
FIGURES = {
    "directional_similarity": 0.4, "image_similarity": 0.6, "psnr_outside_mask": 30.0, "mask_area": 0.2, "seconds": 1.0,
    "dense_calls": 4, "sparse_calls": 21, "mask_over_objects": 1.2, "mask_recall": None, "note": "",
}  # fmt: skip


def record(line: int) -> dict[str, Any]:
    return {
        "line": line,
        "pair": {"input": "a cat", "edit": "swap", "output": "a dog", "kind": "object"},
        "seed": line,
        "status": "done",
        "truth": {"source": "objects", "area": 0.1},
        "everywhere": False,
        "methods": {"dense": FIGURES, "sparse": FIGURES, "sdedit@0.5": {"skipped": "nothing to do"}},
    }


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two pairs that are done."""
    store = Store(tmp_path / "out")
    store.open(CONFIG)
    store.write_text("run.json", json.dumps({"command": "fisedit eval", "shards": 1, "machine": {}, "rejected": []}))
    for line in (1, 2, 3):
        store.write(record(line), {name: torch.randn(4) for name in ("base", *METHODS)})
        store.write_image(line, "base", Image.new("RGB", (16, 16)))
    return store


def report(store: Store) -> dict[str, Any]:
    """Everything that `fisedit eval --report-only` writes and prints."""
    results = write_report(store.folder)
    summary_table(results)
    list(check_lines(results))
    return results


DAMAGES = {
    "empty": b"",
    "zeros": b"\0" * 64,
    "not utf-8": b"\xff\xfe{}",
    "a list": b"[]",
    "a number": b"3",
    "an empty object": b"{}",
    "too deep": b"[" * 100_000,
    "half": json.dumps(record(2)).encode()[:100],
    "another line's": json.dumps(record(7)).encode(),
    "no methods": json.dumps(record(2) | {"methods": None}).encode(),
    "no error": json.dumps(record(2) | {"status": "failed"}).encode(),
    "words for figures": json.dumps(record(2) | {"methods": {"dense": {"image_similarity": "x"}}}).encode(),
    "a figure too large": json.dumps(record(2) | {"methods": {"dense": FIGURES | {"mask_area": 10**400}}}).encode(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_counts_as_not_run(damage: str, store: Store) -> None:
    (store.folder / "pairs/000002.json").write_bytes(DAMAGES[damage])
    assert report(store)["counts"]["done"] == 2
    assert [store.is_done(line) for line in (1, 2, 3)] == [True, False, True]


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff" * 40, save({"base": torch.zeros(2, 2)}), save({"dense": torch.zeros(4)}), save({})],
    ids=["empty", "garbage", "not flat", "without base", "nothing"],
)
def test_damaged_features_are_left_out_and_the_pair_is_run_again(content: bytes, store: Store) -> None:
    (store.folder / "pairs/000002.safetensors").write_bytes(content)
    results = report(store)
    assert results["counts"]["done"] == 3, "its figures still count"
    assert results["methods"][0]["groups"]["all"]["fid_to_base"] is not None
    assert [store.is_done(line) for line in (1, 2, 3)] == [True, False, True]


@pytest.mark.parametrize("odd", [torch.randn(7), torch.full((4,), float("nan"))], ids=["longer", "no numbers"])
def test_features_that_do_not_fit_the_others_are_left_out(odd: torch.Tensor, store: Store) -> None:
    store.write(record(2), {name: odd.clone() for name in ("base", *METHODS)})
    distance = report(store)["methods"][0]["groups"]["all"]["fid_to_base"]
    assert distance is not None and distance == distance


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"rejected": 3, "machine": [], "shards": "x"}'])
def test_damaged_facts_of_the_run_are_left_out(content: bytes, store: Store) -> None:
    (store.folder / "run.json").write_bytes(content)
    assert report(store)["counts"]["done"] == 3


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff" + b"\0" * 50, b"GIF89a"])
def test_damaged_pictures_are_left_out(content: bytes, store: Store) -> None:
    (store.folder / "images/000002/base.jpg").write_bytes(content)
    assert store.image(2, "base") is None
    report(store)


def test_other_files_between_the_records_do_not_matter(store: Store) -> None:
    for name in ("²", "notes", "-1", "9" * 60, "1e3"):
        (store.folder / f"pairs/{name}.json").write_text("{}")
    assert report(store)["counts"]["done"] == 3


def test_half_a_character_in_a_record_does_not_lose_the_report(store: Store) -> None:
    odd = record(2)
    odd["pair"]["edit"] = "a \ud800 cat"
    store.write(odd, {})
    failed = {"line": 3, "pair": {"output": "x\udfff"}, "status": "failed", "error": "RuntimeError: \udcff"}
    store.write(failed, {})
    assert report(store)["counts"] | {"done": 2, "failed": 1} == report(store)["counts"]
    assert "\\ud800" in (store.folder / "report.html").read_text(encoding="utf-8")


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.just(10**400)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=4,
)


@given(st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_no_record_whatever_stops_the_report(store: Store, data: st.DataObject) -> None:
    """One part of a right record is replaced by any JSON value."""
    root = {"record": copy.deepcopy(record(2))}
    parent: Any = root
    key: Any = "record"
    while isinstance(parent[key], dict) and parent[key] and data.draw(st.integers(0, 3)):
        parent = parent[key]
        key = data.draw(st.sampled_from(sorted(parent)))
    parent[key] = data.draw(JSON)
    (store.folder / "pairs/000002.json").write_text(json.dumps(root["record"]))
    assert report(store)["counts"]["done"] in (2, 3)


def test_a_record_is_synced_after_what_it_names(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr("os.fsync", lambda handle: (steps.append("sync"), sync(handle)))
    monkeypatch.setattr("os.replace", lambda old, new: (steps.append(Path(new).suffix), replace(old, new)))
    store.write(record(4), {"base": torch.zeros(4)})
    after = ["sync"] if os.name == "posix" else []
    assert steps == ["sync", ".safetensors", *after, "sync", ".json", *after]
