"""Mean, median and a bootstrap interval of a figure over pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """A figure over pairs.

    Attributes:
        count: pairs that have it.
        mean: over them.
        median: over them.
        low: lower end of the 95 % bootstrap interval of the mean.
        high: its upper end.
        smallest: the smallest value.
        largest: the largest value.
    """

    count: int
    mean: float
    median: float
    low: float
    high: float
    smallest: float
    largest: float

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def summarise(values: Sequence[float | None], seed: int = 0) -> Summary | None:
    """The summary of the values that are not ``None``; ``None`` if there are none."""
    found = np.array([value for value in values if value is not None], dtype=np.float64)
    if not found.size:
        return None
    low, high = bootstrap(found, seed)
    return Summary(
        count=int(found.size),
        mean=float(found.mean()),
        median=float(np.median(found)),
        low=low,
        high=high,
        smallest=float(found.min()),
        largest=float(found.max()),
    )


def bootstrap(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron, 1979); the same for the same values and seed."""
    if values.size == 1:  # scipy refuses to resample a single value
        return float(values[0]), float(values[0])
    interval = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)
