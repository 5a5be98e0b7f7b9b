"""Masks opened, dilated, grown and sieved, and the regions they consist of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from skimage import measure
from skimage.morphology import dilation, disk, opening

from fisedit_compiler.errors import MaskError

_TOUCHING = 2
"""Connectivity of regions: sites that touch at a corner belong together; for what is not active they do not."""


@dataclass(frozen=True)
class Region:
    """One connected region of a mask; sites that touch at a corner are connected.

    Attributes:
        sites: how many it has.
        rows: its first row and the one after its last.
        columns: its first column and the one after its last.
        box: its bounding box ``(top, left, bottom, right)`` as fractions of the picture, as ``box_mask`` takes it.
    """

    sites: int
    rows: tuple[int, int]
    columns: tuple[int, int]
    box: tuple[float, float, float, float]

    def __str__(self) -> str:
        rows, columns = (f"{first}-{end - 1}" for first, end in (self.rows, self.columns))
        return f"{self.sites} {'site' if self.sites == 1 else 'sites'} in rows {rows}, columns {columns}"


def opened(mask: torch.Tensor, radius: int) -> torch.Tensor:
    """Morphological opening of a bool ``[H, W]`` mask by a disk: specks thinner than the disk go."""
    return _morph(mask, radius, opening)


def dilated(mask: torch.Tensor, radius: int) -> torch.Tensor:
    """Morphological dilation of a bool ``[H, W]`` mask by a disk: the mask grows by ``radius`` sites."""
    return _morph(mask, radius, dilation)


def grown(mask: torch.Tensor, sites: int) -> torch.Tensor:
    """A bool ``[H, W]`` mask grown by ``sites`` rows and columns to every side: by a square, not a disk."""
    if sites == 0:
        return mask.clone()
    # A square is separable: two thin poolings instead of one of (2*sites+1)**2.
    down = F.max_pool2d(mask[None].float(), (2 * sites + 1, 1), 1, (sites, 0))
    return F.max_pool2d(down, (1, 2 * sites + 1), 1, (0, sites))[0] > 0


def minimum_area(mask: torch.Tensor, sites: int, *, holes: int | None = None) -> torch.Tensor:
    """A bool ``[H, W]`` mask without its small regions, and then without the small holes of those left.

    Args:
        mask: what to sieve.
        sites: regions (see :class:`Region`) of fewer sites go.
        holes: holes of fewer sites are filled; as many as ``sites`` if left out, 0 keeps every hole. A hole is a
            part outside the mask that the mask encloses; a bay at the picture's edge is none.

    Raises:
        MaskError: a negative number.
    """
    holes = sites if holes is None else holes
    if sites < 0 or holes < 0:
        raise MaskError(f"a minimum area of {min(sites, holes)} sites; give 0 (no change) or more")
    active = mask.cpu().numpy()
    kept = active & ~_small(measure.label(active, connectivity=_TOUCHING), sites)
    # One row and column around the picture: what is connected to them is outside, not a hole.
    gaps = measure.label(np.pad(~kept, 1, constant_values=True), connectivity=1)
    filled = kept | (_small(gaps, holes) & (gaps != gaps[0, 0]))[1:-1, 1:-1]
    return torch.from_numpy(filled).to(mask.device)


def regions(mask: torch.Tensor) -> tuple[Region, ...]:
    """The connected regions of a bool ``[H, W]`` mask, the largest first; none for an empty mask."""
    height, width = mask.shape
    labels = measure.label(mask.cpu().numpy(), connectivity=_TOUCHING)
    sites = np.bincount(labels.ravel())[1:]
    found = []
    for size, (rows, columns) in zip(sites.tolist(), ndimage.find_objects(labels), strict=True):
        box = (rows.start / height, columns.start / width, rows.stop / height, columns.stop / width)
        found.append(Region(size, (rows.start, rows.stop), (columns.start, columns.stop), box))
    return tuple(sorted(found, key=lambda region: (-region.sites, region.rows, region.columns)))


def area(mask: torch.Tensor) -> float:
    """Share of active sites in a bool mask, in [0, 1]."""
    return float(mask.sum()) / max(mask.numel(), 1)


def _small(labels: np.ndarray[Any, Any], sites: int) -> np.ndarray[Any, Any]:
    """Where a label (0 is none) has fewer than ``sites`` sites."""
    small = np.bincount(labels.ravel()) < sites
    small[0] = False
    found: np.ndarray[Any, Any] = small[labels]
    return found


def _morph(mask: torch.Tensor, radius: int, operation: Any) -> torch.Tensor:
    if radius < 0:
        raise MaskError(f"the radius of a morphological operation is {radius}; give 0 (no change) or more")
    if radius == 0:
        return mask.clone()
    grown = operation(mask.cpu().numpy(), disk(radius))
    return torch.from_numpy(np.ascontiguousarray(grown, dtype=bool)).to(mask.device)
