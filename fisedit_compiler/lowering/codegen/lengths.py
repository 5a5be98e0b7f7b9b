"""Which sizes of a lowered graph's inputs differ from mask to mask, and which of them are the same number."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from torch import fx

from fisedit_compiler.graph.inputs import HeldInput, IotaInput, RingRowsInput, TableInput, input_of
from fisedit_compiler.graph.sizes import row_symbol
from fisedit_compiler.graph.specs import spec_of


def lengths(node: fx.Node) -> Mapping[int, Hashable]:
    """The axes of a placeholder that a mask decides, each with what it counts.

    Axes that count the same are equally long in every plan, padded or not: rows of one level, ring sites and taps of
    one geometry of convolutions, blocks of one level.
    """
    match input_of(node):
        case TableInput("active" | "places", level):
            return {0: row_symbol(level)}
        case TableInput("taps", key) if key.in_blocks:
            return {0: ("blocks", key.target), 1: ("taps", key)}
        case TableInput("taps", key):
            return {0: row_symbol(key.target)}
        case TableInput("ring", key) | IotaInput(key):
            return {0: ("ring", key)}
        case RingRowsInput(_, key):
            return {1: ("ring", key)}
        case HeldInput(_, axis):
            return {axis: spec_of(node).shape[axis]}
    return {}
