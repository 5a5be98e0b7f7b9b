"""Tables of results, as rows of text: the page and the document draw the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fisedit_compiler.evaluation.measures.measure import METRICS

_BY_NAME = {metric.name: metric for metric in METRICS}

QUALITY = (
    "directional_similarity", "image_similarity", "text_similarity", "fid_to_base", "fid_to_dense", "psnr_outside_mask",
    "ssim_outside_mask", "distance_outside_mask",
)  # fmt: skip
INSIDE = ("psnr_inside_to_dense", "psnr_inside_to_full")
OBJECTS = ("psnr_outside_objects", "ssim_outside_objects", "distance_outside_objects")
COST = ("seconds", "dense_calls", "sparse_calls", "shallow_calls", "mask_area")
MASK = ("mask_area", "mask_over_objects", "mask_recall", "dense_calls")

_MEDIANS = ("seconds", "mask_area", "mask_over_objects")
"""Figures given as medians: one slow first call or one huge mask says little about the others."""


@dataclass(frozen=True)
class Grid:
    """A table of text.

    Attributes:
        title: above it.
        header: of the columns; the first is left-aligned, the others are figures.
        rows: as many cells each as the header has.
        note: below it.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def method_table(results: Mapping[str, Any], group: str, columns: Sequence[str], title: str) -> Grid:
    """A row per method, over the pairs of a group."""
    # What only some methods have takes no column where none of them ran.
    ran = [figures for method in results["methods"] if (figures := method["groups"].get(group))]
    of_some = {"psnr_inside_to_full", "shallow_calls"} if not any("psnr_inside_to_full" in each for each in ran) else ()
    columns = [column for column in columns if column not in of_some]
    rows = []
    for method in results["methods"]:
        figures = method["groups"].get(group)
        if figures and figures["pairs"]:
            cells = [cell(figures, column) for column in columns]
            rows.append((method["title"], str(figures["pairs"]), *cells))
    header = ("method", "pairs", *(heading(column) for column in columns))
    note = "Values are means with 95 % bootstrap intervals, and medians where the heading says so."
    if len({row[1] for row in rows}) > 1:
        note += " Methods with fewer pairs had nothing to do for the others, so compare rows of as many pairs."
    return Grid(title, header, tuple(rows), note)


def mask_table(results: Mapping[str, Any]) -> Grid:
    """The automatic mask by kind of edit."""
    sparse = next((method for method in results["methods"] if method["name"] == "sparse"), None)
    rows = []
    for group, figures in (sparse["groups"] if sparse else {}).items():
        rows.append((group, str(figures["pairs"]), *(cell(figures, column) for column in MASK)))
    return Grid("The automatic mask by kind of edit", ("pairs", "count", *map(heading, MASK)), tuple(rows))


def check_table(results: Mapping[str, Any]) -> Grid:
    """What must hold, and whether it does."""
    answers = {True: "yes", False: "NO", None: "no pairs"}
    rows = [
        (
            check["question"],
            check["limit"],
            "-" if check["value"] is None else f"{check['value']:.3f}",
            answers[check["passed"]],
            str(check["pairs"]),
            check["detail"],
        )
        for check in results["checks"]
    ]
    return Grid("What must hold", ("", "limit", "measured", "holds", "pairs", "remarks"), tuple(rows))


def heading(name: str) -> str:
    """A column's heading."""
    if name.startswith("fid_to_"):
        return f"FID to {name.removeprefix('fid_to_')}"
    return _BY_NAME[name].title + (" (median)" if name in _MEDIANS else "")


def cell(figures: Mapping[str, Any], name: str) -> str:
    """One figure of one method."""
    value = figures.get(name)
    if value is None:
        return "-"
    if name.startswith("fid_to_"):
        return f"{value:.3g}"
    form = _BY_NAME[name].form
    if name in _MEDIANS:
        return form.format(value["median"])
    if name in ("dense_calls", "sparse_calls", "shallow_calls"):
        return form.format(value["mean"])
    return f"{form.format(value['mean'])} ({form.format(value['low'])} to {form.format(value['high'])})"
