"""What reuse across steps must hold: how far a tolerance may take an edit from the same edit without reuse."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from fisedit_compiler.evaluation.measures.requirements import Records, Requirement

MEDIAN_PSNR = 35.0
LOWEST_PSNR = 28.0
SHARE_ABOVE_LOWEST = 0.95
DIRECTIONAL_CHANGE = 0.005
IMAGE_SIMILARITY_LOSS = 0.002

_FAMILY, _WITHOUT = "reuse@", "default"


def reuse_requirements(records: Records) -> list[Requirement]:
    """The requirements of every tolerance that was run, none if none was."""
    names = dict.fromkeys(name for record in records for name in record["methods"] if name.startswith(_FAMILY))
    return [requirement for name in names for requirement in _of(name, records)]


def _of(name: str, records: Records) -> list[Requirement]:
    words = f"reuse across steps, tolerance {name.removeprefix(_FAMILY)}"
    psnr = [value for record in records if (value := _value(record, name, "psnr_inside_to_full")) is not None]
    median = statistics.median(psnr) if psnr else None
    above = sum(value >= LOWEST_PSNR for value in psnr) / len(psnr) if psnr else None
    ratio = _compared(name, records, "directional_similarity", lambda with_reuse, without: with_reuse / without)
    loss = _compared(name, records, "image_similarity", lambda with_reuse, without: with_reuse - without)
    detail = f"smallest {min(psnr):.1f}" if psnr else ""
    return [
        Requirement(
            f"{words}: median PSNR inside the mask to the edit without it, in dB",
            f">= {MEDIAN_PSNR:g}",
            median,
            None if median is None else median >= MEDIAN_PSNR,
            len(psnr),
            detail,
        ),
        Requirement(
            f"{words}: share of pairs of at least {LOWEST_PSNR:g} dB",
            f">= {SHARE_ABOVE_LOWEST:g}",
            above,
            None if above is None else above >= SHARE_ABOVE_LOWEST,
            len(psnr),
        ),
        Requirement(
            f"{words}: mean directional similarity over that without it",
            f"1 ± {DIRECTIONAL_CHANGE:g}",
            ratio,
            None if ratio is None else abs(ratio - 1.0) <= DIRECTIONAL_CHANGE,
            len(psnr),
        ),
        Requirement(
            f"{words}: mean image similarity less that without it",
            f">= -{IMAGE_SIMILARITY_LOSS:g}",
            loss,
            None if loss is None else loss >= -IMAGE_SIMILARITY_LOSS,
            len(psnr),
        ),
    ]


def _compared(name: str, records: Records, metric: str, compare: Callable[[float, float], float]) -> float | None:
    """The means of both methods over the pairs that have both, compared."""
    found = [(_value(record, name, metric), _value(record, _WITHOUT, metric)) for record in records]
    pairs = [(with_reuse, without) for with_reuse, without in found if with_reuse is not None and without is not None]
    if not pairs:
        return None
    with_reuse, without = (statistics.fmean(values) for values in zip(*pairs, strict=True))
    return compare(with_reuse, without)


def _value(record: dict[str, Any], method: str, metric: str) -> float | None:
    value = record["methods"].get(method, {}).get(metric)
    return None if value is None else float(value)
