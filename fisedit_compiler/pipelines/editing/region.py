"""Boxes and polygons of an edit: where its mask may lie, checked before anything runs.

Alone they are the mask. Together with a drawn mask they cut it, and a mask that lies beside them is a contradiction.
Together with a rule that finds the mask they cut what was found, whatever the rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fisedit_compiler import masks
from fisedit_compiler.errors import MaskError
from fisedit_compiler.masks import Box, Polygon
from fisedit_compiler.masks.shapes import is_numbers
from fisedit_compiler.pipelines.detectors import DetectedMask
from fisedit_compiler.pipelines.editing.runs import Generation


def region_argument(
    box: Box | Sequence[Box] | None, polygon: Polygon | Sequence[Polygon] | None, base: Generation
) -> torch.Tensor | None:
    """The union of an edit's boxes and polygons as a bool mask ``[H, W]`` of latent sites; ``None`` without any.

    Raises:
        MaskError: a shape is none, or leaves the picture; names the shape and the picture's size in pixels.
    """
    height, width = base.latents[0].shape[-2:]
    boxes, polygons = listed(box), listed(polygon)
    single_box = is_numbers(boxes) or not isinstance(boxes, list)
    single_polygon = not isinstance(polygons, list) or any(is_numbers(point) for point in polygons)
    shapes: list[tuple[str, Any, Callable[[int, int, Any], torch.Tensor]]] = []
    shapes += [(name, shape, masks.box_mask) for name, shape in _named("box", boxes, single_box)]
    shapes += [(name, shape, masks.polygon_mask) for name, shape in _named("polygon", polygons, single_polygon)]
    if not shapes:
        return None
    found = []
    for name, shape, draw in shapes:
        try:
            found.append(draw(height, width, shape))
        except MaskError as error:
            size = f"{base.settings.height} pixels high and {base.settings.width} wide"
            raise MaskError(f"{name}: {error}; the picture is {size}") from error
    return masks.union(*found)


def cut(mask: torch.Tensor, region: torch.Tensor | None) -> torch.Tensor:
    """A drawn mask inside the region only.

    Raises:
        MaskError: the two have no site in common, though the mask has some.
    """
    if region is None or not bool(mask.any()):
        return mask
    inside = masks.intersection(mask, region)
    if bool(inside.any()):
        return inside
    raise MaskError(
        f"contradictory mask and box or polygon: the mask lies outside the box. The mask's sites lie within "
        f"{_bounds(mask)}, the region of box= and polygon= within {_bounds(region)}, as (top, left, bottom, right) of "
        "the picture; move one of them so that they overlap, or leave one out"
    )


def cut_found(found: DetectedMask, region: torch.Tensor | None) -> DetectedMask:
    """A found mask inside the region only. A change of the whole picture becomes one of the whole region."""
    if region is None:
        return found
    mask = masks.intersection(found.mask, region)
    return replace(found, mask=mask, everywhere=found.everywhere and bool(mask.all()))


def listed(given: Any) -> Any:
    """A list of what was given, be it an array or ``zip(ys, xs)``, which can be read only once."""
    if isinstance(given, (np.ndarray, torch.Tensor)):
        return given.tolist()
    return list(given) if isinstance(given, Iterable) and not isinstance(given, str) else given


def _named(name: str, given: Any, single: bool) -> list[tuple[str, Any]]:
    if given is None:
        return []
    if single:
        return [(name, given)]
    if not given:
        raise MaskError(f"{name}= is empty; leave it out, or give one or more")
    return [(name if len(given) == 1 else f"{name} {number}", shape) for number, shape in enumerate(given)]


def _bounds(mask: torch.Tensor) -> str:
    """The bounding box of all regions together."""
    boxes = [region.box for region in masks.regions(mask)]
    if not boxes:
        return "nothing (it is smaller than the distance of two sites)"
    tops, lefts, bottoms, rights = zip(*boxes, strict=True)
    values = (min(tops), min(lefts), max(bottoms), max(rights))
    return f"({', '.join(f'{value:.3g}' for value in values)})"
