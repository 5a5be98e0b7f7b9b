"""A sheet of the pictures of an evaluation, for documents: a few pairs of every kind, a column for each method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from fisedit_compiler.errors import FiseditError
from fisedit_compiler.evaluation.pairs.pairs import EditPair
from fisedit_compiler.evaluation.results.store import Store
from fisedit_compiler.evaluation.runner import SHEET_SIZE, sheet_pairs
from fisedit_compiler.pipelines.drawing.pictures import contact_sheet


def picture_sheet(store: Store, results: Mapping[str, Any], count: int) -> Image.Image:
    """Base, mask and every method's picture of ``count`` pairs; pairs come from all kinds in turn.

    Below a picture stand its directional and its image similarity, below the base what was asked for. Methods that had
    nothing to do leave their place white.

    Args:
        store: the evaluation's folder.
        results: contents of its ``results.json``.
        count: rows, at most.

    Raises:
        FiseditError: the folder holds no pictures.
    """
    records = {record["line"]: record for record in store.records() if record["status"] == "done"}
    kept = [pair_of(record) for record in records.values() if store.image(record["line"], "base") is not None]
    if not kept:
        raise FiseditError(f"{str(store.folder)!r} holds no pictures; a run keeps those of its contact sheet")
    names = ["base", "mask", *(method["name"] for method in results["methods"])]
    rows = [[_cell(store, records[pair.line], name) for name in names] for pair in sheet_pairs(kept, count)]
    return contact_sheet(rows, columns=names, size=SHEET_SIZE)


def pair_of(record: Mapping[str, Any]) -> EditPair:
    """The pair that a record is of."""
    pair = record["pair"]
    return EditPair(pair["input"], pair["edit"], pair["output"], kind=pair.get("kind"), line=record["line"])


def similarities(figures: Mapping[str, Any]) -> str:
    """Directional and image similarity of one method, as they stand below its picture; empty if it did not run."""
    if "directional_similarity" not in figures:
        return ""
    return f"{figures['directional_similarity']:.2f} / {figures['image_similarity']:.2f}"


def _cell(store: Store, record: Mapping[str, Any], name: str) -> tuple[Image.Image, str]:
    image = store.image(record["line"], name)
    if image is None:
        return Image.new("RGB", (1, 1), "white"), ""
    if name == "base":
        return image, record["pair"]["edit"] or record["pair"]["output"]
    if name == "mask":
        return image, f"{record['methods']['sparse']['mask_area']:.1%}"
    return image, similarities(record["methods"].get(name, {}))
