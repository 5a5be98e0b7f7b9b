"""Rows that padding repeated, recognised by their sites: a padded plan names the last active site more than once."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def counting_rows(active: Tensor) -> Tensor:
    """bool ``[N]``: of rows of one site the last one, so that sums over rows count every site once.

    Args:
        active: int64 ``[N]``, ascending, its last entry repeated if the plan is padded.
    """
    followed = F.pad(active, (0, 1), value=-1)
    return followed[1:] != followed[:-1]
