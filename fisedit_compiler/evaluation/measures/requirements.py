"""What sparse edits must hold, as questions with a figure, a limit and an answer.

A requirement is answered from the records alone; without pairs it is about, the answer is ``None``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fisedit_compiler.evaluation.measures.statistics import bootstrap
from fisedit_compiler.evaluation.pairs.pairs import LOCAL_KINDS, SCENE_KINDS

Records = Sequence[dict[str, Any]]

DIRECTIONAL_SHARE = 0.95
PSNR_OUTSIDE = 35.0
AREA_RATIO = 2.5
RECALL = 0.9
DENSE_CALLS = 4
LARGE_MASK = 0.5


@dataclass(frozen=True)
class Requirement:
    """One question.

    Attributes:
        question: what must hold.
        limit: of the figure, as text.
        value: the figure; ``None`` without pairs to take it from.
        passed: whether it holds; ``None`` without a figure.
        pairs: number of pairs it is taken from.
        detail: more about the figure.
    """

    question: str
    limit: str
    value: float | None
    passed: bool | None
    pairs: int
    detail: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def requirements(records: Records) -> list[Requirement]:
    """Every requirement, answered from the records of pairs that were run."""
    swaps = [record for record in records if record["pair"].get("kind") == "object"]
    return [
        _directional(records),
        _image_similarity(records),
        _psnr(records),
        *(_area(swaps, source, words) for source, words in _SOURCES),
        *(_recall(swaps, source, words) for source, words in _SOURCES),
        _dense_calls([record for record in records if record["pair"].get("kind") in LOCAL_KINDS]),
        _scene_wide([record for record in records if record["pair"].get("kind") in SCENE_KINDS]),
    ]


_SOURCES = (
    ("objects", "plain backgrounds"),
    ("difference", "scenes, objects approximated by where base and dense differ"),
)


def _directional(records: Records) -> Requirement:
    question = "sparse edits follow the caption: mean directional similarity over that of dense regeneration"
    sparse, dense = _means(records, "directional_similarity")
    if sparse is None or dense is None:
        return Requirement(question, f">= {DIRECTIONAL_SHARE}", None, None, len(records))
    ratio = sparse / dense if dense else None
    passed = sparse >= DIRECTIONAL_SHARE * dense
    detail = f"{sparse:.4f} and {dense:.4f}; {_paired(records, 'directional_similarity')}"
    return Requirement(question, f">= {DIRECTIONAL_SHARE}", ratio, passed, len(records), detail)


def _image_similarity(records: Records) -> Requirement:
    question = "sparse edits stay closer to the base: mean image similarity less that of dense regeneration"
    sparse, dense = _means(records, "image_similarity")
    if sparse is None or dense is None:
        return Requirement(question, "> 0", None, None, len(records))
    detail = f"{sparse:.4f} and {dense:.4f}; {_paired(records, 'image_similarity')}"
    return Requirement(question, "> 0", sparse - dense, sparse > dense, len(records), detail)


def _psnr(records: Records) -> Requirement:
    found = _values(records, "psnr_outside_mask")
    detail = ""
    if found:
        below = sum(value < PSNR_OUTSIDE for value in found)
        detail = f"median {statistics.median(found):.1f}, smallest {min(found):.1f}, {below} of {len(found)} below"
    return _mean_requirement(
        "outside the mask the decoded picture is the base's: mean PSNR in dB",
        f">= {PSNR_OUTSIDE:g}",
        found,
        lambda value: value >= PSNR_OUTSIDE,
        detail,
    )


def _area(records: Records, source: str, words: str) -> Requirement:
    found = _values(_with_source(records, source), "mask_over_objects")
    return _mean_requirement(
        f"swapped objects: median mask area over the area of both objects ({words})",
        f"<= {AREA_RATIO:g}",
        found,
        lambda value: value <= AREA_RATIO,
        f"largest {max(found):.2f}" if found else "",
        statistics.median,
    )


def _recall(records: Records, source: str, words: str) -> Requirement:
    found = _values(_with_source(records, source), "mask_recall")
    detail = ""
    if found:
        below = sum(value < RECALL for value in found)
        detail = f"median {statistics.median(found):.3f}, {below} of {len(found)} below"
    return _mean_requirement(
        f"swapped objects: mean share of them that the mask covers ({words})",
        f">= {RECALL:g}",
        found,
        lambda value: value >= RECALL,
        detail,
    )


def _dense_calls(records: Records) -> Requirement:
    found = _values(records, "dense_calls")
    above = [record for record in records if (_value(record, "dense_calls") or 0) > DENSE_CALLS]
    detail = f"{len(above)} of {len(found)} edits made more, {sum(r['everywhere'] for r in above)} taken for scene-wide"
    return _mean_requirement(
        "local edits: most dense calls of one",
        f"<= {DENSE_CALLS}",
        found,
        lambda value: value <= DENSE_CALLS,
        detail if found else "",
        max,
    )


def _scene_wide(records: Records) -> Requirement:
    found = _values(records, "mask_area")
    detail = ""
    if found:
        everywhere = sum(bool(record["everywhere"]) for record in records)
        small = [record["line"] for record in records if (_value(record, "mask_area") or 0.0) < LARGE_MASK]
        detail = f"{everywhere} of {len(found)} run densely; smaller masks in lines {small or 'none'}"
    return _mean_requirement(
        "scene-wide edits: smallest mask",
        f">= {LARGE_MASK:.0%}",
        found,
        lambda value: value >= LARGE_MASK,
        detail,
        min,
    )


def _mean_requirement(
    question: str,
    limit: str,
    found: list[float],
    holds: Callable[[float], bool],
    detail: str = "",
    figure: Callable[[list[float]], float] = statistics.fmean,
) -> Requirement:
    if not found:
        return Requirement(question, limit, None, None, 0, detail)
    value = float(figure(found))
    return Requirement(question, limit, value, holds(value), len(found), detail)


def _means(records: Records, metric: str) -> tuple[float | None, float | None]:
    sparse, dense = _values(records, metric), _values(records, metric, "dense")
    return (statistics.fmean(sparse) if sparse else None, statistics.fmean(dense) if dense else None)


def _paired(records: Records, metric: str) -> str:
    """The interval of the difference between the two methods, pair by pair: pairs differ more than methods do."""
    values = [(_value(record, metric), _value(record, metric, "dense")) for record in records]
    found = [sparse - dense for sparse, dense in values if sparse is not None and dense is not None]
    if not found:
        return "no pair has both"
    low, high = bootstrap(np.array(found))
    return f"difference per pair, 95 %: {low:+.4f} to {high:+.4f}"


def _with_source(records: Records, source: str) -> Records:
    return [record for record in records if (record.get("truth") or {}).get("source") == source]


def _values(records: Records, metric: str, method: str = "sparse") -> list[float]:
    values = [_value(record, metric, method) for record in records]
    return [value for value in values if value is not None]


def _value(record: dict[str, Any], metric: str, method: str = "sparse") -> float | None:
    value = record["methods"].get(method, {}).get(metric)
    return None if value is None else float(value)
