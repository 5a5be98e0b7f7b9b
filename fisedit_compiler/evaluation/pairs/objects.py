"""Where the changed object really is, found by looking at the pictures.

On a plain background an object's pixels are those that differ from the backdrop, which is smooth: a surface of second
order per colour channel, fitted to the border of the picture. A soft shadow under an object is the backdrop, darker: it
is left out, so it counts neither for the object's area nor for the recall of a mask. In a scene the backdrop has
structure of its own; there the largest parts in which the base and the dense regeneration differ stand for the object,
without what only became darker or lighter (shadows) and without thin lines (a horizon that moved). That is an
approximation, and the reports keep it apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from skimage.measure import label
from skimage.morphology import closing, disk, opening

from fisedit_compiler.evaluation.pairs.grammar import has_plain_background
from fisedit_compiler.evaluation.pairs.pairs import LOCAL_KINDS, Box, EditPair

Pixels = NDArray[np.bool_]
Source = Literal["objects", "difference"]

_BORDER = 0.06
"""Width of the border that the backdrop is fitted to, as a share of the picture; no object touches it usually."""
_DIFFERENT = 28.0
"""Largest difference of a channel (of 255) that the decoder's own unevenness makes on a plain backdrop, and some."""
_DARKEST_SHADOW = 0.35
_SHADOW_COLOUR = 16.0
"""How far (of 255, root mean square) a shadow may be from the backdrop's own colour made darker."""
_CHANGED = 24.0
"""Difference of a channel (of 255) that counts as a change between two runs of a scene."""
_PART = 0.2
"""Smallest part of a changed object, as a share of its largest one."""
_SPECK = 0.0005
"""Smallest component, as a share of the picture."""


@dataclass(frozen=True)
class GroundTruth:
    """The pixels an edit should change.

    Attributes:
        pixels: bool ``[height, width]``.
        source: ``"objects"`` for the union of the object in the base and in the dense regeneration, ``"difference"``
            for the pixels in which the two differ.
    """

    pixels: Pixels
    source: Source

    @property
    def area(self) -> float:
        """Share of the picture, in [0, 1]."""
        return float(self.pixels.mean())

    def recall(self, mask: Pixels) -> float | None:
        """Share of these pixels that a mask of the same size covers; ``None`` if there are none."""
        return float(mask[self.pixels].mean()) if self.pixels.any() else None


def ground_truth(pair: EditPair, base: Image.Image, dense: Image.Image) -> GroundTruth | None:
    """What the pair should change; ``None`` without a region, or if nothing is found in it.

    Args:
        pair: says where to look and in which way.
        base: picture of the input caption.
        dense: picture of the output caption, from the same noise.
    """
    if pair.region is None:
        return None
    plain = has_plain_background(pair.input) and has_plain_background(pair.output)
    if plain and pair.kind in LOCAL_KINDS:
        pixels = object_pixels(base, pair.region) | object_pixels(dense, pair.region)
        source: Source = "objects"
    elif pair.kind in (None, *LOCAL_KINDS):
        pixels, source = changed_object(base, dense, pair.region), "difference"
    else:
        pixels, source = changed_pixels(base, dense, pair.region), "difference"
    return GroundTruth(pixels, source) if pixels.any() else None


def object_pixels(image: Image.Image, region: Box) -> Pixels:
    """Pixels of the objects whose larger part lies in ``region``, on a plain background.

    An object that stands out from the backdrop less than its shading does (silver on grey) is found in part.
    """
    pixels = _floats(image)
    backdrop = fit_backdrop(pixels)
    foreground = (np.abs(pixels - backdrop).max(axis=2) > _DIFFERENT) & ~_is_shadow(pixels, backdrop)
    return _components_in(_tidy(foreground), region)


def changed_pixels(base: Image.Image, other: Image.Image, region: Box) -> Pixels:
    """Pixels inside ``region`` in which two pictures differ clearly."""
    first, second = _floats(base), _floats(other)
    return _tidy(np.abs(first - second).max(axis=2) > _CHANGED) & box_pixels(region, first.shape[:2])


def changed_object(base: Image.Image, other: Image.Image, region: Box) -> Pixels:
    """The largest parts inside ``region`` in which two pictures differ in more than brightness, thin lines left out."""
    first, second = _floats(base), _floats(other)
    shaded = _is_shadow(first, second) | _is_shadow(second, first)
    changed = (np.abs(first - second).max(axis=2) > _CHANGED) & ~shaded
    changed = closing(changed & box_pixels(region, changed.shape), disk(2))
    solid = opening(ndimage.binary_fill_holes(changed), disk(max(min(changed.shape) // 64, 1)))
    labels, count = ndimage.label(solid)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    sizes[0] = 0
    return sizes[labels] > max(_PART * sizes.max(), _SPECK * solid.size)


def fit_backdrop(pixels: NDArray[np.float64], rounds: int = 3) -> NDArray[np.float64]:
    """The smooth surface of second order through the picture's border, ``[height, width, channels]`` like ``pixels``.

    Border pixels far from the fit (an object that touches it) are left out of the next round.
    """
    height, width = pixels.shape[:2]
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1)
    edge = max(round(_BORDER * min(height, width)), 1)
    border = np.ones((height, width), dtype=bool)
    border[edge:-edge, edge:-edge] = False
    used = border
    for _ in range(rounds):
        solution: Any = np.linalg.lstsq(terms[used], pixels[used], rcond=None)[0]
        surface: NDArray[np.float64] = terms @ solution
        error = np.abs(pixels - surface).max(axis=2)
        kept = border & (error <= max(2.0 * float(np.median(error[border])), 4.0))
        if kept.sum() < 0.3 * border.sum():
            break
        used = kept
    return surface


def box_pixels(box: Box, size: tuple[int, ...]) -> Pixels:
    """A box in fractions as bool ``[height, width]``."""
    height, width = size
    top, left, bottom, right = box
    pixels = np.zeros((height, width), dtype=bool)
    pixels[round(top * height) : round(bottom * height), round(left * width) : round(right * width)] = True
    return pixels


def _floats(image: Image.Image) -> NDArray[np.float64]:
    return np.asarray(image.convert("RGB")).astype(np.float64)


def _is_shadow(pixels: NDArray[np.float64], backdrop: NDArray[np.float64]) -> Pixels:
    """Where a pixel is the backdrop's colour, only darker."""
    energy = (backdrop * backdrop).sum(axis=2) + 1e-9
    share = (pixels * backdrop).sum(axis=2) / energy
    rest = np.sqrt(np.square(pixels - share[..., None] * backdrop).mean(axis=2))
    return (share > _DARKEST_SHADOW) & (share < 1.0) & (rest < _SHADOW_COLOUR)


def _tidy(pixels: Pixels) -> Pixels:
    """Without thin specks, with holes filled."""
    radius = max(round(min(pixels.shape) / 256), 1)
    cleaned = opening(pixels, disk(radius))
    filled = ndimage.binary_fill_holes(closing(cleaned, disk(2 * radius)))
    labels, _ = ndimage.label(filled)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return sizes[labels] > _SPECK * filled.size


def _components_in(pixels: Pixels, region: Box) -> Pixels:
    """Components of which more than half lies in the region, and of the others the part that does if it is large."""
    inside = box_pixels(region, pixels.shape)
    labels, count = label(pixels, return_num=True)
    found = np.zeros_like(pixels)
    for number in range(1, count + 1):
        component = labels == number
        share = float(inside[component].mean())
        if share > 0.5:
            found |= component
        elif share > 0.25:  # it touches the other object
            found |= component & inside
    return found
