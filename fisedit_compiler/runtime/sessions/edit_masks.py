"""The masks of the edits that are made in one run: read once, grown once, and then only looked at.

A session, its checks, its plans and the callback that keeps an edit on its base all ask for the same sites; they get
them from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisedit_compiler.errors import MaskError
from fisedit_compiler.masks import grown, to_site_mask


@dataclass(frozen=True, eq=False)
class EditMask:
    """The mask of one edit.

    Attributes:
        sites: bool ``[H, W]``: what was asked for.
        grown: bool ``[H, W]``: what is computed, the same grown by ``SparsifyConfig.dilation``.
    """

    sites: Tensor
    grown: Tensor

    @classmethod
    def of(cls, sites: Tensor, dilation: int) -> EditMask:
        """Of a bool mask ``[H, W]``, which its owner may write to afterwards."""
        kept = sites.clone()
        return cls(kept, grown(kept, dilation) if dilation else kept)


@dataclass(frozen=True, eq=False)
class EditMasks:
    """The masks of several edits of one base, or one mask that is all of theirs.

    Attributes:
        parts: one mask for each edit, in their order, or a single one.
    """

    parts: Sequence[EditMask]

    @classmethod
    def of(cls, mask: Any, copies: int, height: int, width: int, dilation: int) -> EditMasks:
        """Read masks in any form.

        Args:
            mask: one mask, or a sequence or a stack ``[copies, H, W]`` of them, each as ``to_site_mask`` takes it;
                or what this function returned before.
            copies: how many edits are made at once.
            height: rows of the latent.
            width: columns of the latent.
            dilation: sites by which masks are grown.

        Raises:
            MaskError: a mask does not fit, or there are neither one nor ``copies`` of them.
        """
        if isinstance(mask, EditMasks):
            given: Sequence[Any] | None = mask.parts
        else:
            given = _each(mask, copies)
        if given is None:
            return cls([EditMask.of(to_site_mask(mask, height, width, image_scale=None), dilation)])
        if len(given) != copies and not (isinstance(mask, EditMasks) and len(given) == 1):
            raise MaskError(
                f"{len(given)} masks were given for {copies} {'copy' if copies == 1 else 'copies'} of the recording; "
                "pass one mask for all of them, or one for each"
            )
        if isinstance(mask, EditMasks):
            return mask
        sites = [to_site_mask(one, height, width, image_scale=None).cpu() for one in given]
        return cls([EditMask.of(one, dilation) for one in sites])

    @cached_property
    def differ(self) -> bool:
        """Whether the edits have different masks."""
        first = self.parts[0].sites
        return any(one.sites is not first and not torch.equal(one.sites, first) for one in self.parts[1:])

    @cached_property
    def sites(self) -> Tensor:
        """bool ``[H, W]``: what any of the edits may change."""
        return self._union([one.sites for one in self.parts])

    @cached_property
    def grown(self) -> Tensor:
        """bool ``[H, W]``: the same with every mask grown."""
        return self._union([one.grown for one in self.parts])

    @cached_property
    def each(self) -> Tensor | None:
        """bool ``[copies, H, W]``; ``None`` if all edits have the same mask."""
        return torch.stack([one.sites for one in self.parts]) if self.differ else None

    @cached_property
    def each_grown(self) -> Tensor:
        """bool ``[copies, H, W]``, grown; ``[1, H, W]`` if all edits have the same mask."""
        return torch.stack([one.grown for one in (self.parts if self.differ else self.parts[:1])])

    def _union(self, masks: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(masks)).any(dim=0) if self.differ else masks[0]


def _each(mask: Any, copies: int) -> Sequence[Any] | None:
    """The masks one by one if several were given."""
    if isinstance(mask, (list, tuple)):
        return mask if copies > 1 or len(mask) == 1 else None
    if isinstance(mask, (Tensor, np.ndarray)) and copies > 1:
        stacked = mask.ndim == 3 or (mask.ndim == 4 and mask.shape[1] == 1)
        if stacked and mask.shape[0] != 1:
            return list(mask)
    return None
