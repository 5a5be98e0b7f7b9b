"""Masks as the oracle takes them: one a resolution, checked, and spread to resolutions where a test needs some."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

Resolution = tuple[int, int]
ActiveSites = Mapping[Resolution, Tensor]


class OracleError(AssertionError):
    """The oracle was asked something it has no answer to; the message says what to pass instead."""


def spread_mask(mask: Tensor, resolutions: Collection[Resolution]) -> dict[Resolution, Tensor]:
    """Bool ``[H, W]`` mask brought to other resolutions: a coarse site is active if any site below it is.

    Plain any-pooling and repetition, for tests that need *some* site plan; real plans may choose otherwise.
    Every resolution must divide the mask's or be a multiple of it.
    """
    height, width = mask.shape
    spread = {}
    for rows, columns in resolutions:
        if (height % rows and rows % height) or (width % columns and columns % width):
            raise OracleError(f"a {height}x{width} mask has no obvious form at {rows}x{columns}: build it by hand")
        fine = mask.repeat_interleave(max(1, rows // height), 0).repeat_interleave(max(1, columns // width), 1)
        blocks = fine.reshape(rows, fine.shape[0] // rows, columns, fine.shape[1] // columns)
        spread[rows, columns] = blocks.any(dim=3).any(dim=1)
    return spread


def resolution_of(feature_map: Tensor) -> Resolution:
    height, width = feature_map.shape[-2:]
    return int(height), int(width)


def mask_of(feature_map: Tensor, active: ActiveSites) -> Tensor:
    resolution = resolution_of(feature_map)
    if resolution not in active:
        raise OracleError(
            f"a boundary sees a {resolution[0]}x{resolution[1]} map, but active sites are given for "
            f"{sorted(active)} only: add its mask (all True pins nothing)"
        )
    return active[resolution]


def token_mask(count: int, active: ActiveSites) -> Tensor | None:
    """The flattened mask of the resolution that has ``count`` sites, or None when none has."""
    matches = [mask for (height, width), mask in active.items() if height * width == count]
    if len(matches) > 1:
        raise OracleError(f"{count} tokens fit several resolutions of {sorted(active)}: use other sizes")
    return matches[0].reshape(-1) if matches else None


def check_masks(active: ActiveSites) -> None:
    for resolution, mask in active.items():
        if mask.dtype != torch.bool or tuple(mask.shape) != resolution:
            raise OracleError(
                f"the active sites of {resolution} are {mask.dtype} {tuple(mask.shape)}: pass bool [H, W]"
            )
