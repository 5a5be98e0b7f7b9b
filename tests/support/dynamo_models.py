"""Modules that ``torch.compile(backend="fisedit")`` is tried on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.support.compiled_zoo import (
    make_mask,
    zoo_model,
)

NEVER_DENSE = {"dense_above": 1.0}
SAMPLE = torch.linspace(-1, 1, 2 * 4 * 8 * 8).reshape(2, 4, 8, 8)
MASK = make_mask("block", (8, 8))


def compiled_by_dynamo(name: str, dynamic: bool | None = None, **options: Any) -> nn.Module:
    options = NEVER_DENSE | options
    result: nn.Module = torch.compile(zoo_model(name).module, backend="fisedit", dynamic=dynamic, options=options)
    return result


class Convolved(nn.Module):
    """The base of modules that show one thing each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)


class Plain(Convolved):
    def forward(self, sample: Tensor, scale: float = 2.0) -> Tensor:
        return self.conv(sample) * scale


class Broken(Convolved):
    def forward(self, sample: Tensor) -> Tensor:
        hidden = self.conv(sample)
        torch._dynamo.graph_break()
        return self.conv(hidden)
