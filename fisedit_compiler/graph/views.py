"""Operations that only rename, regroup or reorder axes, and which axis of the result each axis of the input becomes."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch
from torch import fx

from fisedit_compiler.graph.sizes import BATCH, HEIGHT, WIDTH

aten = torch.ops.aten
SWAPS = frozenset({aten.transpose.int, aten.swapaxes.default, aten.swapdims.default})
PERMUTATIONS = frozenset({aten.permute.default, aten.mT.default, aten.movedim.int, aten.movedim.intlist, *SWAPS})
VIEWS = frozenset(
    {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int}
)
"""Operations that regroup axes without moving data between them."""

RANK_CHANGES = frozenset({aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims})
"""Operations that add or drop axes of one entry."""

Group = tuple[tuple[int, ...], tuple[int, ...]]


def view_groups(before: Sequence[sympy.Expr], after: Sequence[sympy.Expr]) -> list[Group] | None:
    """Match the axes of a view: groups of input axes and output axes with equal products, in order.

    Returns ``None`` when the products never meet (which a real view cannot do).
    """
    groups: list[Group] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = [i] if i < len(before) else [], [j] if j < len(after) else []
        product_left = before[i] if left else sympy.Integer(1)
        product_right = after[j] if right else sympy.Integer(1)
        i, j = i + len(left), j + len(right)
        while product_left != product_right:
            ratio = product_right / product_left
            grow_left = i < len(before) and (j >= len(after) or _at_least_one(ratio))
            if grow_left:
                product_left, i = product_left * before[i], i + 1
                left.append(i - 1)
            elif j < len(after):
                product_right, j = product_right * after[j], j + 1
                right.append(j - 1)
            else:
                return None
        groups.append((tuple(left), tuple(right)))
    return groups


def _at_least_one(ratio: sympy.Expr) -> bool:
    """Whether ``right / left`` still has factors that the left side must grow to."""
    numerator, denominator = ratio.as_numer_denom()
    if numerator.free_symbols != denominator.free_symbols:
        return bool(numerator.free_symbols - denominator.free_symbols)
    value = ratio.subs({BATCH: 5, HEIGHT: 7, WIDTH: 11})
    return bool(value > 1)


def order_of(node: fx.Node, rank: int) -> list[int]:
    """Which input axis each axis of a permutation's result is."""
    if node.target is aten.permute.default:
        return [int(axis) % rank for axis in node.args[1]]  # type: ignore[union-attr,arg-type]
    if node.target in (aten.movedim.int, aten.movedim.intlist):
        sources, targets = ([axis] if isinstance(axis, int) else axis for axis in node.args[1:3])
        moved = {int(t) % rank: int(s) % rank for s, t in zip(sources, targets, strict=True)}  # type: ignore[arg-type]
        kept = iter(axis for axis in range(rank) if axis not in moved.values())
        return [moved[axis] if axis in moved else next(kept) for axis in range(rank)]
    first, second = (-2, -1) if node.target is aten.mT.default else node.args[1:3]
    order = list(range(rank))
    order[first], order[second] = order[second], order[first]  # type: ignore[index]
    return order
