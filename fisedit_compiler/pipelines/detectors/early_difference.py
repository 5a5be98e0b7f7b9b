"""The default rule: look at one step, and at more of them only while the answer is not clear.

At the first call both runs have the same latents, so all that differs after it is what the new words ask for. Three
things make that one step enough where the published rule sums four: the latest difference is taken instead of a sum of
stretched ones, it is smoothed before it is split, and it is split below Otsu's threshold, since the edge of an object
differs less than its middle. ``docs/quality.md`` has the figures, ``benchmarks/edit_extent.py`` those of the limits.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field, replace

import torch
from skimage import filters

from fisedit_compiler import masks
from fisedit_compiler.errors import ConfigError, MaskError
from fisedit_compiler.pipelines.detectors.base import DetectedMask, MaskDetector, difference_and_size
from fisedit_compiler.pipelines.detectors.registry import register_mask_detector


@register_mask_detector("early-difference")
@dataclass
class EarlyDifference(MaskDetector):
    """Splits the difference of the latents after the latest step, as soon as it splits clearly.

    How clear it is, is the mean difference below the threshold over that above it, called *quiet*. A step is enough if
    quiet is at most ``clear``. A change that never gets so clear is one of the whole picture if quiet was above
    ``everywhere_ratio`` in the mean of the steps seen: later steps of a local edit differ more and more outside the
    object, since a new object moves its surroundings, while a new background differs everywhere from the first step
    on. A model that says little in its first step, as one that predicts noise may, is watched for longer.

    Attributes:
        smoothing: standard deviation in sites of the Gaussian that the difference is smoothed with.
        threshold_share: part of Otsu's threshold above which a site counts as changed.
        opening_radius: radius in sites of the disk that removes specks.
        dilation_radius: radius in sites of the disk that grows what is left; shadows and soft edges need room.
        clear: value of quiet up to which the change is taken for local at once.
        everywhere_ratio: mean of quiet above which the change is taken for one of the whole picture after the last
            step; 1 never says so.
        floor: differences up to this share of the base's largest latent are rounding, not change.
        max_calls: steps to look at, at most; if left out, one in short runs and four in others.
        steps: steps seen so far.

    Raises:
        ConfigError: a radius or the smoothing is negative, or a share outside [0, 1].
    """

    smoothing: float = 1.0
    threshold_share: float = 0.5
    opening_radius: int = 1
    dilation_radius: int = 3
    clear: float = 0.09
    everywhere_ratio: float = 0.145
    floor: float = 1e-4
    max_calls: int | None = None
    steps: int = field(default=0, init=False)
    _heat: torch.Tensor | None = field(default=None, init=False, repr=False)
    _split: _Split | None = field(default=None, init=False, repr=False)
    _quiet: list[float] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        shares = (self.threshold_share, self.clear, self.everywhere_ratio, self.floor)
        looks = 1 if self.max_calls is None else self.max_calls
        if min(self.opening_radius, self.dilation_radius, self.smoothing) < 0 or looks < 1:
            raise ConfigError(f"{self}: radii and smoothing must be 0 or more, and max_calls 1 or more")
        if not all(0.0 <= share <= 1.0 for share in shares):
            raise ConfigError(f"{self}: threshold_share, clear, everywhere_ratio and floor must lie between 0 and 1")

    def fresh(self) -> EarlyDifference:
        """The same rule without the steps seen so far."""
        return replace(self)

    def update(self, edited: torch.Tensor, base: torch.Tensor) -> None:
        """See one step; only the latest counts. Both are latents ``[B, C, H, W]``.

        Raises:
            MaskError: the two shapes differ, or the latents hold NaN or infinity.
        """
        self._heat, size = difference_and_size(edited, base)
        self._split = None
        if float(self._heat.max()) > self.floor * size:
            self._split = _split(self._heat, self.smoothing, self.threshold_share)
            self._quiet.append(self._split.quiet)
        self.steps += 1

    def decide(self, last: bool) -> DetectedMask | None:
        """A local mask as soon as it is clear; what it looks like after the last step otherwise.

        Raises:
            MaskError: no step was seen.
        """
        if self._heat is None:
            raise MaskError("no step was compared yet; the automatic mask needs at least one dense call")
        if self._split is None:
            equal = not bool(self._heat.any())
            nothing = torch.zeros_like(self._heat, dtype=torch.bool)
            return DetectedMask(nothing, None, self._heat) if equal or last else None
        split, quiet = self._split, self._split.quiet
        if quiet > self.clear:
            if not last:
                return None
            quiet = statistics.fmean(self._quiet)
            if quiet > self.everywhere_ratio:
                everywhere = torch.ones_like(split.above)
                return DetectedMask(everywhere, split.threshold, split.heat, everywhere=True, quiet=quiet)
        mask = masks.opened(split.above, self.opening_radius)
        return DetectedMask(masks.dilated(mask, self.dilation_radius), split.threshold, split.heat, quiet=quiet)


@dataclass(frozen=True)
class _Split:
    """A smoothed difference ``[H, W]``, the value it is split at, and what lies above."""

    heat: torch.Tensor
    threshold: float
    above: torch.Tensor
    quiet: float


def _split(heat: torch.Tensor, smoothing: float, share: float) -> _Split:
    smooth = torch.from_numpy(filters.gaussian(heat.numpy(), smoothing, mode="nearest", preserve_range=True))
    even = float(smooth.min()) > 0.999 * float(smooth.max())  # Otsu's histogram would have no width
    threshold = share * float(smooth.max() if even else filters.threshold_otsu(smooth.numpy()))
    above = smooth > threshold
    quiet = 1.0 if bool(above.all()) else float(smooth[~above].mean() / smooth[above].mean())
    return _Split(smooth, threshold, above, quiet)
