"""``report.html``: one page without network of an evaluation's results, with the curve and a contact sheet."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

from PIL import Image

from fisedit_compiler.evaluation.pages import tables
from fisedit_compiler.evaluation.pages.curve import as_svg, trade_off
from fisedit_compiler.evaluation.pages.sheet import pair_of, similarities
from fisedit_compiler.evaluation.pages.tables import Grid
from fisedit_compiler.evaluation.results.store import Store
from fisedit_compiler.evaluation.runner import SHEET_PAIRS, sheet_pairs

THUMBNAIL = 112
"""Edge in pixels of a picture on the contact sheet."""
SHEET_BYTES = 3_500_000
"""Room for the contact sheet, so that the page stays below 5 MB; what does not fit is left out and said to be."""

_TITLES = {"all": "All pairs", "local": "Edits of one object", "scene-wide": "Edits of the whole picture"}


def build_report(store: Store, results: Mapping[str, Any]) -> str:
    """The page as HTML.

    Args:
        store: where the pictures are.
        results: of :func:`~fisedit_compiler.evaluation.results.aggregate.aggregate`.
    """
    template = resources.files(__package__) / "report.html"
    return Template(template.read_text(encoding="utf-8")).substitute(
        title=escape(f"Edits compared: {results['counts']['done']} pairs, {results['configuration']['model']}"),
        checks=_table(tables.check_table(results), text=True),
        curves="".join(_curves(results)),
        tables="".join(_table(grid) for grid in grids(results)),
        sheet=_sheet(store, results),
        failures=_failures(results),
        run=escape(json.dumps({"configuration": results["configuration"], "run": results["run"]}, indent=1)),
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


def _curves(results: Mapping[str, Any]) -> list[str]:
    groups = [group for group in ("all", "local") if results["counts"][group]]
    return [f"<h3>{_TITLES[group]}</h3>{as_svg(trade_off(results, group), inline=True)}" for group in groups]


def _table(grid: Grid, text: bool = False) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in grid.header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in grid.rows)
    style = ' class="text"' if text else ""
    return (
        f'<h2>{escape(grid.title)}</h2><div class="scroll"><table{style}><thead><tr>{head}</tr></thead>'
        f'<tbody>{body}</tbody></table></div><p class="note">{escape(grid.note)}</p>'
    )


def _sheet(store: Store, results: Mapping[str, Any]) -> str:
    records = {record["line"]: record for record in store.records() if record["status"] == "done"}
    kept = [pair_of(record) for record in records.values() if store.image(record["line"], "base") is not None]
    names = ["base", "mask", *(method["name"] for method in results["methods"])]
    rows, size = [], 0
    for pair in sheet_pairs(kept, SHEET_PAIRS):
        row = _sheet_row(store, records[pair.line], names)
        size += len(row)
        if size > SHEET_BYTES:
            rows.append("<tr><td>the other pairs are left out: the page would become too large</td></tr>")
            break
        rows.append(row)
    if not rows:
        return "<p>no pictures were kept</p>"
    head = "".join(f"<th>{escape(name)}</th>" for name in ("captions", *names))
    return f'<table class="sheet"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _sheet_row(store: Store, record: Mapping[str, Any], names: Sequence[str]) -> str:
    pair = record["pair"]
    kind = pair.get("kind", "pair")
    area = record["methods"].get("sparse", {}).get("mask_area")
    mask = "" if area is None else f"<br>mask {area:.1%}"
    caption = f"<b>{escape(pair['edit'] or kind)}</b><br>{escape(pair['input'])}<br>line {record['line']}, {kind}{mask}"
    cells = []
    for name in names:
        image = store.image(record["line"], name)
        figures = record["methods"].get(name, {})
        below = similarities(figures)
        shown = (
            escape(figures.get("skipped", "")) if image is None else f'<img alt="{escape(name)}" src="{_data(image)}">'
        )
        cells.append(f"<td>{shown}{below}</td>")
    return f'<tr><td class="caption">{caption}</td>{"".join(cells)}</tr>'


def _failures(results: Mapping[str, Any]) -> str:
    lines = [
        *(f"line {item['line']}: {item['error']} ({item['pair']['output']})" for item in results["failed"]),
        *results["run"].get("rejected", ()),
        *(
            f"{method['name']}: nothing to do for {count} pairs: {reason}"
            for method in results["methods"]
            for reason, count in method["skipped"].items()
        ),
    ]
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else "<p>none</p>"


def _data(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
