"""Which block size each level of a plan gets: the one with the smallest estimate over the level's convolutions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fisedit_compiler.geometry.block_costs import Fitted, fits
from fisedit_compiler.geometry.conv_tables import ConvKey
from fisedit_compiler.geometry.patches import BLOCK_SIZES
from fisedit_compiler.geometry.site_plan import SitePlan

Estimates = Mapping[Fraction, Mapping[int, float]]


@dataclass(frozen=True)
class ConvLayer:
    """One sparse convolution of a program: its geometry and its channels."""

    key: ConvKey
    channels: int
    out_channels: int


class BlockSizes:
    """The block sizes of one program's plans.

    Args:
        layers: all sparse convolutions of the program.

    Attributes:
        levels: levels with convolutions that can be computed in blocks, finest first.
    """

    def __init__(self, layers: Iterable[ConvLayer]) -> None:
        counted = Counter(layer for layer in layers if layer.key.in_blocks)
        self.levels = tuple(sorted({layer.key.target for layer in counted}))
        # One array entry per distinct convolution: a choice is made between a mask and its first call.
        self._counts = np.array(list(counted.values()), dtype=np.float64)
        self._level = np.array([self.levels.index(layer.key.target) for layer in counted], dtype=np.int64)
        self._shapes = {
            "taps": _numbers(layer.key.kernel[0] * layer.key.kernel[1] for layer in counted),
            "channels": _numbers(layer.channels for layer in counted),
            "out_channels": _numbers(layer.out_channels for layer in counted),
        }
        self._patches = {size: _numbers(prod(layer.key.patch(size)) for layer in counted) for size in BLOCK_SIZES}

    def estimates(
        self,
        plan: SitePlan,
        batch: int,
        element_size: int,
        device_type: str,
        fitted: Mapping[int, Fitted] | None = None,
    ) -> Estimates:
        """Microseconds of all convolutions of a level, per level and block size.

        Args:
            plan: a plan of the program.
            batch: samples of a call.
            element_size: bytes of an element.
            device_type: ``torch.device.type`` of where the convolutions run.
            fitted: fits to use instead of the packaged ones of the device type.

        Returns:
            Nothing for sizes that nobody measured on the device type.
        """
        known = fits(device_type) if fitted is None else fitted
        found: dict[Fraction, dict[int, float]] = {level: {} for level in self.levels}
        rows = _numbers(plan.rows(level) for level in self.levels)
        for size in sorted(known):
            blocks = _numbers(plan.block_count(level, size) for level in self.levels)
            features: dict[str, Any] = {
                **self._shapes, "patch": self._patches[size], "rows": rows[self._level], "blocks": blocks[self._level],
                "outputs": size * size, "batch": batch, "element": element_size,
            }  # fmt: skip
            times = known[size].microseconds(features) * self._counts * (features["rows"] > 0)
            for level, total in zip(self.levels, np.bincount(self._level, times, len(self.levels)), strict=True):
                found[level][size] = float(total)
        return found

    def choose(
        self,
        plan: SitePlan,
        batch: int,
        element_size: int,
        device_type: str,
        fitted: Mapping[int, Fitted] | None = None,
    ) -> dict[Fraction, int]:
        """The cheapest size per level, see :meth:`estimates`; 1 where nobody measured."""
        estimates = self.estimates(plan, batch, element_size, device_type, fitted)
        return {level: min(sizes, key=sizes.__getitem__, default=1) for level, sizes in estimates.items()}


def _numbers(values: Iterable[float]) -> NDArray[np.float64]:
    return np.array(list(values), dtype=np.float64)
