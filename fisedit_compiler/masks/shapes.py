"""Boxes, ellipses and polygons as masks, and several of them at once.

Every position is a fraction of the picture, the vertical one first: ``(top, left, bottom, right)`` for a box,
``(y, x)`` for a point, from ``(0, 0)`` at the upper left corner to ``(1, 1)`` at the lower right one. So a shape fits
the latent and the image alike. A site is inside if its *centre* is: that of row ``i`` of ``H`` lies at
``(i + 0.5) / H``. A centre on an upper or left border is inside, on a lower or right one outside, so shapes that share
a border share no site and leave none out between them.
"""

from __future__ import annotations

import numbers
import os
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image

from fisedit_compiler.errors import MaskError
from fisedit_compiler.masks.convert import MaskLike, to_site_mask

Box: TypeAlias = tuple[float, float, float, float]
"""``(top, left, bottom, right)`` as fractions of the picture."""

Polygon: TypeAlias = Sequence[tuple[float, float]]
"""Corners ``(y, x)`` as fractions of the picture, in order; the last is joined to the first."""


def box_mask(height: int, width: int, box: Box) -> torch.Tensor:
    """A rectangle of active sites.

    Args:
        height: rows of the mask.
        width: columns of the mask.
        box: ``(top, left, bottom, right)`` as fractions of the picture in [0, 1]; sites whose centre lies in it are
            active, upper and left border included, lower and right one excluded.

    Returns:
        A bool tensor ``[height, width]``.

    Raises:
        MaskError: no four numbers, the box leaves the picture, or its ends are swapped.
    """
    top, left, bottom, right = _checked_box(box)
    y, x = _centres(height), _centres(width)
    return ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))[None, :]


def ellipse_mask(height: int, width: int, box: Box) -> torch.Tensor:
    """The ellipse that fills ``box``; same arguments, result and errors as :func:`box_mask`."""
    top, left, bottom, right = _checked_box(box)
    y, x = _centres(height), _centres(width)
    tiny = torch.finfo(torch.float64).tiny
    vertical = (2 * y - top - bottom) / max(bottom - top, tiny)
    horizontal = (2 * x - left - right) / max(right - left, tiny)
    return vertical[:, None].square() + horizontal[None, :].square() <= 1.0


def polygon_mask(height: int, width: int, points: Polygon) -> torch.Tensor:
    """The inside of a polygon.

    Borders count as in :func:`box_mask`: the polygon of a box's corners is that box, and of two polygons with a common
    edge exactly one has a site that lies on it. Where the line crosses itself the even-odd rule decides: what it goes
    around twice is outside. (The fills of scikit-image and matplotlib do not promise either, hence this one.)

    Args:
        height: rows of the mask.
        width: columns of the mask.
        points: three or more corners ``(y, x)`` as fractions of the picture in [0, 1], in order.

    Returns:
        A bool tensor ``[height, width]``.

    Raises:
        MaskError: fewer than three points, something that is no point, or a point outside the picture.
    """
    corners = _checked_polygon(points)
    y, x = _centres(height)[:, None], _centres(width)[None, :]
    inside = torch.zeros(height, width, dtype=torch.bool, device="cpu")
    for first, second in zip(corners, [*corners[1:], corners[0]], strict=True):
        # From top to bottom whatever the order, so that a common edge of two polygons rounds alike in both.
        (upper, upper_x), (lower, lower_x) = sorted((first, second))
        if upper == lower:
            continue  # a level edge bounds what the edges at its ends say
        crossing = upper_x + (y - upper) * ((lower_x - upper_x) / (lower - upper))
        # A ray from the centre to the right crosses this edge.
        inside ^= (upper <= y) & (y < lower) & (x < crossing)
    return inside


def union(*masks: torch.Tensor) -> torch.Tensor:
    """The sites active in at least one of some bool masks ``[H, W]``.

    Raises:
        MaskError: no mask, or masks that are not bool or of different sizes.
    """
    return _combined(masks).any(dim=0)


def intersection(*masks: torch.Tensor) -> torch.Tensor:
    """The sites active in every one of some bool masks ``[H, W]``; same errors as :func:`union`."""
    return _combined(masks).all(dim=0)


def regions_mask(height: int, width: int, regions: Iterable[Box | Polygon | MaskLike]) -> torch.Tensor:
    """Several regions as one mask: the union of boxes, polygons and masks, in any mixture.

    Args:
        height: rows of the mask.
        width: columns of the mask.
        regions: each a box (four numbers), a polygon (three or more pairs of numbers), or what
            :func:`~fisedit_compiler.masks.to_site_mask` takes.

    Returns:
        A bool tensor ``[height, width]`` on the CPU; nothing is active without a region.

    Raises:
        MaskError: as :func:`box_mask`, :func:`polygon_mask` and ``to_site_mask``; its text begins with the number of
            the region at fault, counted from 0.
    """
    mask = torch.zeros(height, width, dtype=torch.bool, device="cpu")
    for number, region in enumerate(regions):
        try:
            mask |= _region(height, width, region)
        except MaskError as error:
            raise MaskError(f"region {number}: {error}") from error
    return mask


def is_numbers(shape: Any) -> bool:
    """Whether ``shape`` is meant as one box or one point (a sequence of numbers), not as a sequence of shapes."""
    if isinstance(shape, (torch.Tensor, np.ndarray)):
        return shape.ndim == 1
    return isinstance(shape, Sequence) and len(shape) > 0 and not isinstance(shape, str) and _is_number(shape[0])


def _region(height: int, width: int, region: Any) -> torch.Tensor:
    if isinstance(region, (torch.Tensor, np.ndarray, Image.Image, str, os.PathLike)):
        return to_site_mask(region, height, width).cpu()
    if is_numbers(region):
        return box_mask(height, width, region)
    return polygon_mask(height, width, region)


def _centres(size: int) -> torch.Tensor:
    return (torch.arange(size, dtype=torch.float64, device="cpu") + 0.5) / size


def _combined(masks: Sequence[torch.Tensor]) -> torch.Tensor:
    if not masks:
        raise MaskError("there is no mask to combine; pass one or more")
    for mask in masks:
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.ndim != 2:
            kind = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise MaskError(f"only bool tensors [H, W] can be combined, not {kind}; convert it by to_site_mask")
        if mask.shape != masks[0].shape:
            raise MaskError(
                f"masks of {list(masks[0].shape)} and {list(mask.shape)} sites cannot be combined; convert both to "
                "the latent's size by to_site_mask"
            )
    return torch.stack([mask.to(masks[0].device) for mask in masks])


def _checked_box(box: Any) -> Box:
    values = _numbers(box)
    if values is None or len(values) != 4:
        raise MaskError(f"a box is (top, left, bottom, right), four fractions of the picture, not {box!r}")
    top, left, bottom, right = values
    if not (0.0 <= top <= bottom <= 1.0 and 0.0 <= left <= right <= 1.0):
        raise MaskError(
            f"box {box} is not (top, left, bottom, right) with 0 <= top <= bottom <= 1 and 0 <= left <= "
            f"right <= 1; {_in_pixels(f'({top:g} / height, {left:g} / width, {bottom:g} / height, {right:g} / width)')}"
        )
    return top, left, bottom, right


def _checked_polygon(points: Any) -> list[tuple[float, float]]:
    try:
        corners = list(points)
    except TypeError:
        corners = []
    if len(corners) < 3:
        raise MaskError(f"a polygon has three or more points (y, x), not {points!r}")
    checked = []
    for corner in corners:
        values = _numbers(corner)
        if values is None or len(values) != 2:
            raise MaskError(f"a polygon's point is (y, x), two fractions of the picture, not {corner!r}")
        y, x = values
        if not (0.0 <= y <= 1.0 and 0.0 <= x <= 1.0):
            raise MaskError(
                f"the polygon's point {corner} is not (y, x) with both in [0, 1]; "
                f"{_in_pixels(f'({y:g} / height, {x:g} / width)')}"
            )
        checked.append((y, x))
    return checked


def _in_pixels(divided: str) -> str:
    return f"divide pixel positions by the image's height and width: {divided}"


def _numbers(values: Any) -> tuple[float, ...] | None:
    """The numbers of a sequence as floats, or ``None`` if it is none of numbers."""
    try:
        listed = values.tolist() if isinstance(values, (torch.Tensor, np.ndarray)) else list(values)
    except TypeError:
        return None
    return tuple(float(value) for value in listed) if all(map(_is_number, listed)) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
