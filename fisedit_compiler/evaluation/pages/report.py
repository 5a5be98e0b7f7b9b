"""``report.html``: one page without network of an evaluation's results, with the curve and a contact sheet."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from PIL import Image

from fisedit_compiler.evaluation.pages import tables
from fisedit_compiler.evaluation.pages.curve import as_svg, trade_off
from fisedit_compiler.evaluation.pages.sheet import pair_of, similarities
from fisedit_compiler.evaluation.pages.tables import Grid
from fisedit_compiler.evaluation.results.store import Store
from fisedit_compiler.evaluation.runner import SHEET_PAIRS, sheet_pairs
from fisedit_compiler.pages import render

THUMBNAIL = 112
"""Edge in pixels of a picture on the contact sheet."""
SHEET_BYTES = 3_500_000
"""Room for the pictures of the contact sheet, so that the page stays below 5 MB; further ones are left out."""

_TITLES = {"all": "All pairs", "local": "Edits of one object", "scene-wide": "Edits of the whole picture"}
_SECTIONS = {
    "checks": "What must hold", "curve": "Curve", "tables": "Tables", "sheet": "Contact sheet", "failures": "Failures",
    "run": "Run",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A picture of a method as a data URL, or ``None``, and the words below it or in its place."""

    name: str
    picture: str | None
    words: str


@dataclass(frozen=True)
class Row:
    """A pair: what was asked for, the base's caption, further words, and its pictures."""

    edit: str
    caption: str
    about: str
    cells: list[Cell]


@dataclass(frozen=True)
class Sheet:
    """The contact sheet: names of its columns, its rows, and whether further ones found no room."""

    names: list[str]
    rows: list[Row]
    cut: bool


def build_report(store: Store, results: Mapping[str, Any]) -> str:
    """The page as HTML.

    Args:
        store: where the pictures are.
        results: of :func:`~fisedit_compiler.evaluation.results.aggregate.aggregate`.
    """
    return render(
        __package__,
        "report.html",
        title=f"Edits compared: {results['counts']['done']} pairs, {results['configuration']['model']}",
        sections=_SECTIONS,
        checks=tables.check_table(results),
        curves=_curves(results),
        grids=grids(results),
        sheet=_sheet(store, results),
        failures=_failures(results),
        run=json.dumps({"configuration": results["configuration"], "run": results["run"]}, indent=1),
    )


def grids(results: Mapping[str, Any]) -> list[Grid]:
    """The tables of the results, in order."""
    present = [group for group in _TITLES if results["counts"][group]]
    if len(present) == 2 and results["counts"]["all"] == results["counts"][present[1]]:
        present = present[:1]
    found = [
        tables.method_table(results, group, (*tables.QUALITY, *tables.INSIDE, *tables.COST), _TITLES[group])
        for group in present
    ]
    if results["counts"]["local"]:
        found.append(tables.method_table(results, "local", tables.OBJECTS, "Outside the objects themselves"))
    return [*found, tables.mask_table(results)]


def _curves(results: Mapping[str, Any]) -> list[tuple[str, Markup]]:
    groups = [group for group in ("all", "local") if results["counts"][group]]
    return [(_TITLES[group], Markup(as_svg(trade_off(results, group), inline=True))) for group in groups]


def _sheet(store: Store, results: Mapping[str, Any]) -> Sheet:
    records = {record["line"]: record for record in store.records() if record["status"] == "done"}
    kept = [pair_of(record) for record in records.values() if store.image(record["line"], "base") is not None]
    names = ["base", "mask", *(method["name"] for method in results["methods"])]
    rows: list[Row] = []
    size = 0
    for pair in sheet_pairs(kept, SHEET_PAIRS):
        row = _sheet_row(store, records[pair.line], names)
        size += sum(len(cell.picture or "") for cell in row.cells)
        if size > SHEET_BYTES:
            return Sheet(names, rows, cut=True)
        rows.append(row)
    return Sheet(names, rows, cut=False)


def _sheet_row(store: Store, record: Mapping[str, Any], names: Sequence[str]) -> Row:
    pair = record["pair"]
    kind = pair.get("kind", "pair")
    area = record["methods"].get("sparse", {}).get("mask_area")
    cells = []
    for name in names:
        image = store.image(record["line"], name)
        figures = record["methods"].get(name, {})
        skipped = figures.get("skipped", "") if image is None else ""
        cells.append(Cell(name, None if image is None else _data(image), skipped + similarities(figures)))
    about = f"line {record['line']}, {kind}" + ("" if area is None else f", mask {area:.1%}")
    return Row(pair["edit"] or kind, pair["input"], about, cells)


def _failures(results: Mapping[str, Any]) -> list[str]:
    return [
        *(f"line {item['line']}: {item['error']} ({item['pair']['output']})" for item in results["failed"]),
        *results["run"].get("rejected", ()),
        *(
            f"{method['name']}: nothing to do for {count} pairs: {reason}"
            for method in results["methods"]
            for reason, count in method["skipped"].items()
        ),
    ]


def _data(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
