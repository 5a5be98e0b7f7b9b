"""Layouts of values in every order of axes that a model may have, and values of them."""

from __future__ import annotations

from fractions import Fraction

import torch

from fisedit_compiler.graph.axis_roles import Batch, Channel, Role, Sites
from fisedit_compiler.graph.layout import Layout

LEVEL = Fraction(2)
B, C = Batch(), Channel()
H, W, S = Sites(LEVEL, "height"), Sites(LEVEL, "width"), Sites(LEVEL)
SIZES: dict[Role, int] = {B: 2, C: 3, H: 4, W: 5, S: 20}
ROLES: dict[str, tuple[Role, ...]] = {
    "map": (B, C, H, W),
    "channels last": (B, H, W, C),
    "sites first": (H, W, B, C),
    "batch not first": (C, B, H, W),
    "batch last": (C, H, W, B),
    "width first": (B, C, W, H),
    "sites apart": (B, H, C, W),
    "width first and apart": (W, B, C, H),
    "sites alone": (H, W),
    "heads": (B, C, C, H, W),
    "tokens": (B, S, C),
    "tokens last": (B, C, S),
    "tokens first": (S, B, C),
    "heads of tokens": (B, C, S, C),
}


def value_of(layout: Layout, offset: int = 0) -> torch.Tensor:
    """A dense value, every element another number."""
    sizes = [SIZES[role] for role in layout.roles]
    return torch.arange(torch.Size(sizes).numel()).reshape(sizes) + offset
