"""Which row is that of a site: the table of active sites turned around."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_table(active: Tensor, sites: int) -> Tensor:
    """int32 ``[S]``: the row of every active site, -1 elsewhere. Of rows repeated by padding, the last one counts."""
    table = torch.full((sites,), -1, dtype=torch.int64, device=active.device)
    rows = torch.arange(active.shape[0], device=active.device)
    return table.scatter_reduce(0, active, rows, "amax").to(torch.int32)
