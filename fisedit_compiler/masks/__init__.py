"""Masks as the compiler wants them: one boolean per latent site, and the tools to make and mend them.

Pure functions only: no model, no recording and no file is written here. ``convert`` takes what a user has, ``painted``
says which pixels of an image count, ``shapes`` draws boxes, ellipses and polygons, ``morphology`` opens, grows and
sieves masks and lists their regions, ``feather`` gives the weights of a soft border. Site plans, which turn a mask into
index tables, live in ``fisedit_compiler.geometry``. May import ``images``, ``progress`` and the rooms below.
"""

from fisedit_compiler.masks.convert import MaskLike, mask_pixels, to_site_mask
from fisedit_compiler.masks.feather import feather_weights, weights_per_step
from fisedit_compiler.masks.morphology import Region, area, dilated, grown, minimum_area, opened, regions
from fisedit_compiler.masks.shapes import (
    Box,
    Polygon,
    box_mask,
    ellipse_mask,
    intersection,
    polygon_mask,
    regions_mask,
    union,
)

__all__ = [
    "Box",
    "MaskLike",
    "Polygon",
    "Region",
    "area",
    "box_mask",
    "dilated",
    "ellipse_mask",
    "feather_weights",
    "grown",
    "intersection",
    "mask_pixels",
    "minimum_area",
    "opened",
    "polygon_mask",
    "regions",
    "regions_mask",
    "to_site_mask",
    "union",
    "weights_per_step",
]
