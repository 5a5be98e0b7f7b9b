"""Results, page and document, from records made up so that every figure is known."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fisedit_compiler.errors import FiseditError
from fisedit_compiler.evaluation.command import write_report
from fisedit_compiler.evaluation.measures.requirements import requirements
from fisedit_compiler.evaluation.pages import document as documents
from fisedit_compiler.evaluation.pages.curve import as_svg, trade_off
from fisedit_compiler.evaluation.results.aggregate import aggregate
from fisedit_compiler.evaluation.results.store import Store
from fisedit_compiler.evaluation.runner import SHEET_SIZE

METHODS = ["dense", "sparse", "sdedit@0.3", "sdedit@0.7", "p2p@0.4"]


def figures(**changes: Any) -> dict[str, Any]:
    common = {"directional_similarity": 0.8, "image_similarity": 0.6, "seconds": 1.0, "dense_calls": 25, "note": ""}
    return common | changes


def record(line: int, kind: str = "object", source: str | None = "objects", **sparse: Any) -> dict[str, Any]:
    """A pair's record; ``sparse`` changes its sparse edit's figures."""
    edit = figures(
        image_similarity=0.7, psnr_outside_mask=40.0, mask_area=0.1, mask_over_objects=1.5, mask_recall=0.95,
        dense_calls=4, sparse_calls=21,
    ) | sparse  # fmt: skip
    return {
        "line": line,
        "pair": {"input": "a <cat>", "edit": "swap", "output": "a dog", "kind": kind},
        "seed": line,
        "status": "done",
        "truth": None if source is None else {"source": source, "area": 0.06},
        "everywhere": edit["mask_area"] == 1.0,
        "methods": {
            "dense": figures(),
            "sparse": edit,
            "sdedit@0.3": figures(directional_similarity=0.2, image_similarity=0.9),
            "sdedit@0.7": figures(directional_similarity=0.6, image_similarity=0.5),
            "p2p@0.4": {"skipped": "this version records no attention maps"},
        },
    }


def check(records: list[dict[str, Any]], words: str) -> Any:
    (found,) = (item for item in requirements(records) if words in item.question)
    return found


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two swaps, a new background and a failure."""
    store = Store(tmp_path / "out")
    config = {
        "model": "emoji-scenes", "clip": "emoji-clip", "features": "CLIP image tower", "methods": METHODS, "steps": 25,
        "guidance": 5.0, "dtype": "float32", "backend": "eager",
    }  # fmt: skip
    store.open(config)
    store.write_text(
        "run.json",
        json.dumps(
            {
                "command": "fisedit eval p.jsonl",
                "pairs_command": "fisedit eval --make-pairs 4 p.jsonl",
                "pairs": 4,
                "shards": 2,
                "machine": {"gpu": "Some GPU"},
                "versions": {"torch": "2.11"},
                "rejected": ["p.jsonl:5: not JSON"],
            }
        ),
    )
    torch.manual_seed(0)
    records = [record(1), record(2, source="difference"), record(3, "background", None, mask_area=1.0, dense_calls=25)]
    for item in records:
        store.write(item, {name: torch.randn(4) for name in ("base", *METHODS[:-1])})
        for name in ("base", "mask", *METHODS[:-1]):
            store.write_image(item["line"], name, Image.new("RGB", (256, 256), (40 * item["line"], 90, 120)))
    store.write({"line": 4, "pair": {"output": "x"}, "status": "failed", "error": "RuntimeError: <no luck>"}, {})
    return store


def test_results_have_figures_by_method_and_group(store: Store) -> None:
    results = aggregate(store)
    assert {name: results["counts"][name] for name in ("done", "failed", "rejected", "object", "background")} == {
        "done": 3, "failed": 1, "rejected": 1, "object": 2, "background": 1,
    }  # fmt: skip
    methods = {method["name"]: method for method in results["methods"]}
    sparse = methods["sparse"]["groups"]
    assert sparse["all"]["mask_area"]["mean"] == pytest.approx(0.4)
    assert sparse["all"]["mask_area"]["median"] == pytest.approx(0.1)
    assert sparse["local"]["mask_area"]["largest"] == pytest.approx(0.1)
    assert sparse["scene-wide"]["pairs"] == 1
    assert sparse["all"]["fid_to_base"] > 0 and methods["dense"]["groups"]["all"]["fid_to_dense"] < 1e-3
    assert methods["p2p@0.4"]["skipped"] == {"this version records no attention maps": 3}
    assert methods["p2p@0.4"]["groups"]["all"]["pairs"] == 0
    assert results["failed"][0]["error"] == "RuntimeError: <no luck>"
    json.dumps(results, allow_nan=False)


def test_the_page_needs_nothing_else_and_shows_what_there_is(store: Store) -> None:
    write_report(store.folder)
    page = (store.folder / "report.html").read_text()
    assert not re.search(r"https?:|<link|<script|@import|src=\"(?!data:)", page)
    assert len(page) < 5_000_000
    assert page.count("data:image/jpeg;base64,") == 3 * 6
    assert page.count("<svg") == 2
    for text in ("a &lt;cat&gt;", "RuntimeError: &lt;no luck&gt;", "p.jsonl:5: not JSON", "records no attention maps"):
        assert text in page


def test_a_contact_sheet_that_is_too_large_is_cut(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fisedit_compiler.evaluation.pages.report.SHEET_BYTES", 8000)
    write_report(store.folder)
    page = (store.folder / "report.html").read_text()
    assert "left out: the page would become too large" in page


def test_the_curve_joins_a_methods_strengths(store: Store) -> None:
    figure = trade_off(aggregate(store))
    (axes,) = figure.axes
    lines = {container.get_label().split(":")[0]: container[0].get_xydata().tolist() for container in axes.containers}
    assert lines["sdedit"] == [[pytest.approx(0.9), pytest.approx(0.2)], [pytest.approx(0.5), pytest.approx(0.6)]]
    assert len(lines["dense"]) == 1 and "p2p" not in lines
    assert as_svg(figure) == as_svg(figure)
    assert "xmlns=" in as_svg(figure) and "xmlns" not in as_svg(figure, inline=True)


def test_methods_that_left_pairs_out_are_marked(store: Store) -> None:
    item = record(3, "background", None, mask_area=1.0, dense_calls=25)
    item["methods"]["sdedit@0.7"] = {"skipped": "too strong"}
    store.write(item, store.features(3))
    results = aggregate(store)
    (axes,) = trade_off(results).axes
    assert "sdedit: SDEdit, strength (2 of 3 pairs)" in [container.get_label() for container in axes.containers]
    assert "Methods with fewer pairs had nothing to do for the others" in documents.document([results], "")
    assert "fewer pairs" not in documents.document([aggregate(store)], "").split("### Edits of one object")[1]


def test_without_results_the_page_says_so(store: Store) -> None:
    store.clear()
    store.open({"model": "m", "clip": "c", "features": "f", "methods": METHODS, "steps": 25, "guidance": 5.0,
                "dtype": "float32", "backend": "eager"})  # fmt: skip
    results = write_report(store.folder)
    assert results["counts"]["done"] == 0
    assert all(item["passed"] is None for item in results["checks"])
    assert "no pictures were kept" in (store.folder / "report.html").read_text()


def test_a_folder_without_an_evaluation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FiseditError, match="holds no evaluation"):
        write_report(tmp_path)


def test_the_document_says_what_was_run_and_measured(store: Store, tmp_path: Path, capsys: Any) -> None:
    write_report(store.folder)
    figure = tmp_path / "curve.svg"
    documents.main([str(store.folder / "results.json"), "--figure", str(figure), "--document", str(tmp_path / "q.md")])
    text = capsys.readouterr().out
    for words in (
        "$ fisedit eval --make-pairs 4 p.jsonl\n$ fisedit eval p.jsonl", "Some GPU", "torch 2.11", "2 processes shared",
        "| sparse, automatic mask | 3 |", "](curve.svg)", "## Methods compared", "line 4 failed",
    ):  # fmt: skip
        assert words in text
    assert figure.read_text().startswith("<svg")
    assert text == documents.document(
        [json.loads((store.folder / "results.json").read_text())],
        f"python -m fisedit_compiler.evaluation.pages.document {store.folder / 'results.json'} --figure {figure} "
        f"> {tmp_path / 'q.md'}",
        "curve.svg",
    )


def test_notes_stand_under_their_results_and_the_curve_is_of_most_methods(store: Store, tmp_path: Path) -> None:
    many = aggregate(store)
    few = {**many, "methods": many["methods"][:1]}
    text = documents.document([few, many], "", "curve.svg", ["", "Of an older version."])
    first, second = re.split(r"## Methods compared on \d+ pairs\n", text)[1:]
    assert "older" not in first and "curve.svg" not in first
    assert second.lstrip().startswith("Of an older version.") and "](curve.svg)" in second
    assert documents.with_curve([few, many]) is many


def test_the_document_shows_pictures_of_the_first_results(store: Store, tmp_path: Path, capsys: Any) -> None:
    write_report(store.folder)
    sheet = tmp_path / "sheet.png"
    results, document = str(store.folder / "results.json"), str(tmp_path / "q.md")
    documents.main([results, "--pictures", str(store.folder), str(sheet), "--document", document])
    text = capsys.readouterr().out
    assert "](sheet.png)" in text and f"--pictures {store.folder.name} {sheet}" in text
    with Image.open(sheet) as image:
        # A row per pair that was done: its base, its mask, and a column per method.
        assert image.width > (2 + len(METHODS)) * SHEET_SIZE and 3 * SHEET_SIZE < image.height < 5 * SHEET_SIZE
        shown = image.convert("RGB").getpixel((SHEET_SIZE // 2, SHEET_SIZE // 2))
        assert shown == pytest.approx((40, 90, 120), abs=2), "the first pair's base, kept as JPEG"
    with pytest.raises(FiseditError, match="holds no pictures"):
        documents.main([results, "--pictures", str(tmp_path), str(sheet)])


def test_a_damaged_picture_is_left_out_of_the_page(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    damaged = next(store.folder.glob("images/*/base.jpg"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    write_report(store.folder)
    assert store.image(int(damaged.parent.name), "base") is None
    assert "base.jpg" in caplog.text and "left out" in caplog.text


def test_something_else_is_no_results_file(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"format": 9}')
    with pytest.raises(FiseditError, match="format 9"):
        documents.read_results(tmp_path / "x.json")
    (tmp_path / "y.json").write_text("[]")
    with pytest.raises(FiseditError, match=r"no results\.json"):
        documents.read_results(tmp_path / "y.json")


def test_similarities_are_compared_with_dense_regeneration() -> None:
    records = [record(1, directional_similarity=0.78), record(2, directional_similarity=0.74)]
    found = check(records, "follow the caption")
    assert found.value == pytest.approx(0.95) and found.passed
    assert not check([record(1, directional_similarity=0.75)], "follow the caption").passed
    closer = check(records, "closer to the base")
    assert closer.value == pytest.approx(0.1) and closer.passed
    assert not check([record(1, image_similarity=0.6)], "closer to the base").passed


def test_the_outside_is_held_to_35_db() -> None:
    found = check([record(1, psnr_outside_mask=33.0), record(2, psnr_outside_mask=41.0)], "outside the mask")
    assert found.value == 37.0 and found.passed and "1 of 2 below" in found.detail
    assert not check([record(1, psnr_outside_mask=34.9)], "outside the mask").passed
    assert check([record(1, psnr_outside_mask=None)], "outside the mask").passed is None


def test_masks_of_swaps_are_compared_with_the_objects_backgrounds_apart() -> None:
    records = [
        record(1, mask_over_objects=2.0, mask_recall=1.0),
        record(2, mask_over_objects=2.6, mask_recall=0.7),
        record(3, mask_over_objects=9.0, mask_recall=0.9),
        record(4, source="difference", mask_over_objects=1.0, mask_recall=0.5),
        record(5, "size", mask_over_objects=50.0, mask_recall=0.0),
    ]
    plain = check(records, "both objects (plain")
    assert (plain.value, plain.passed, plain.pairs) == (2.6, False, 3)
    assert check(records, "both objects (scenes").passed
    assert check(records, "the mask covers (plain").value == pytest.approx(2.6 / 3)
    assert not check(records, "the mask covers (scenes").passed


def test_similarities_are_compared_pair_by_pair() -> None:
    """Pairs differ by 0.4, methods by 0.02 in each: the interval is of the latter."""
    records = [record(1), record(2)]
    for item, value in zip(records, (0.3, 0.7), strict=True):
        item["methods"]["dense"]["image_similarity"] = value
        item["methods"]["sparse"]["image_similarity"] = value + 0.02
    found = check(records, "closer to the base")
    assert found.passed and found.detail == "0.5200 and 0.5000; difference per pair, 95 %: +0.0200 to +0.0200"
    del records[0]["methods"]["dense"]["image_similarity"], records[1]["methods"]["sparse"]["image_similarity"]
    assert check(records, "closer to the base").detail.endswith("no pair has both")


def test_a_local_edit_taken_for_scene_wide_counts_against_the_dense_calls() -> None:
    assert check([record(1), record(2, "add")], "most dense calls").passed
    found = check([record(1), record(2, dense_calls=25, mask_area=1.0)], "most dense calls")
    assert (found.value, found.passed) == (25.0, False)
    assert found.detail == "1 of 2 edits made more, 1 taken for scene-wide"


def test_scene_wide_edits_must_not_be_patches() -> None:
    good = [
        record(1, "background", mask_area=1.0),
        record(2, "weather", mask_area=0.6),
        record(3, "overlay", mask_area=0.1),
    ]
    found = check(good, "scene-wide")
    assert (found.value, found.passed, found.pairs) == (0.6, True, 2)
    assert "1 of 2 run densely" in found.detail
    found = check([*good, record(9, "weather", mask_area=0.2)], "scene-wide")
    assert not found.passed and "lines [9]" in found.detail
