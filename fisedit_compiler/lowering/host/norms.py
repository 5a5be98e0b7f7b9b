"""Fold the GroupNorms of a step that use recorded statistics: the scales and shifts of all of them at once.

Before: ``group_norm_sites(rows, slot_statistics, weight, bias, groups, eps)``, a dozen small operations each
After:  ``scale_and_shift(rows, scale, shift)``, one operation; scales and shifts come from one call of
        ``coefficients([slot_statistics, ...], ...)`` at the beginning of the step

Recorded statistics are known before anything is computed. Results are the same, bit for bit.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fisedit_compiler.graph.inputs import SlotInput, input_of
from fisedit_compiler.graph.ir import call
from fisedit_compiler.graph.specs import has_spec, spec_of
from fisedit_compiler.lowering.host.named import compute_by
from fisedit_compiler.lowering.host.prepared import Preparation, Recipe

NORM = torch.ops.fisedit.group_norm_sites.default


def fold_norms(preparation: Preparation) -> None:
    """Change the norms of a graph whose statistics, weights and biases are inputs, where there are several."""
    together: dict[str, list[Any]] = {}
    for node in preparation.graph.nodes:
        if node.target is NORM and _is_foldable(preparation, node):
            statistics: Any = node.args[1]
            together.setdefault(str(spec_of(statistics).shape[0]), []).append(node)
    for norms in together.values():
        if len(norms) > 1:
            _fold(preparation, norms)


def _fold(preparation: Preparation, norms: Sequence[Any]) -> None:
    """Of one batch size: a model may repeat its samples on the way, or drop some."""
    graph = preparation.graph
    sizes = [int(node.args[0].meta["spec"].shape[2]) for node in norms]
    groups = tuple(int(node.args[4]) for node in norms)
    eps = tuple(float(node.args[5]) for node in norms)
    weights, biases = (tuple(preparation.weight(node.args[position]) for node in norms) for position in (2, 3))
    prepared = [
        preparation.placeholder(Recipe(_side_by_side, weights), "norm_weights"),
        preparation.placeholder(Recipe(_side_by_side, biases), "norm_biases"),
        preparation.placeholder(Recipe(_groups_of_channels, (), (tuple(sizes), groups)), "norm_groups"),
        preparation.placeholder(Recipe(_eps_of_groups, (), (eps, groups)), "norm_eps"),
    ]
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        both = call(graph, coefficients, ([node.args[1] for node in norms], *prepared, sizes))
        scales, shifts = (call(graph, operator.getitem, (both, position)) for position in (0, 1))
    for number, node in enumerate(norms):
        with graph.inserting_before(node):
            parts = [call(graph, operator.getitem, (each, number)) for each in (scales, shifts)]
        compute_by(scale_and_shift, node)
        node.args = (node.args[0], *parts)


def _is_foldable(preparation: Preparation, node: fx.Node) -> bool:
    rows, statistics, *affine = node.args[:4]
    known = all(isinstance(value, fx.Node) and has_spec(value) for value in (rows, statistics))
    recorded = known and isinstance(input_of(statistics), SlotInput)
    return recorded and all(_is_vector(preparation, value) for value in affine)


def _is_vector(preparation: Preparation, node: Any) -> bool:
    weight = preparation.weight(node)
    value = None if weight is None else preparation.value(weight)
    return isinstance(value, Tensor) and value.dim() == 1 and value.is_cpu


def _side_by_side(*values: Tensor) -> Tensor:
    return torch.cat([value.detach().float() for value in values])


def _groups_of_channels(sizes: Sequence[int], groups: Sequence[int]) -> Tensor:
    """int64 ``[channels]``: which of the groups of all norms a channel belongs to."""
    channels_each = [size // count for size, count in zip(sizes, groups, strict=True) for _ in range(count)]
    return torch.arange(len(channels_each)).repeat_interleave(torch.tensor(channels_each))


def _eps_of_groups(eps: Sequence[float], groups: Sequence[int]) -> Tensor:
    return torch.tensor([value for value, count in zip(eps, groups, strict=True) for _ in range(count)])


def coefficients(
    statistics: Sequence[Tensor], weights: Tensor, biases: Tensor, groups: Tensor, eps: Tensor, sizes: list[int]
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Scale and shift of every norm, ``[B, 1, C]`` each, float32.

    Args:
        statistics: of every norm, ``[B, groups, 2]``, mean and biased variance.
        weights: of all norms, side by side.
        biases: likewise.
        groups: for every channel its group, among those of all norms.
        eps: of every group.
        sizes: channels of every norm.
    """
    means, variances = torch.cat(list(statistics), 1).unbind(2)
    scales = torch.rsqrt(variances + eps).index_select(1, groups) * weights
    shifts = biases - means.index_select(1, groups) * scales
    return scales.unsqueeze(1).split(sizes, 2), shifts.unsqueeze(1).split(sizes, 2)


def scale_and_shift(rows: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``rows * scale + shift``, computed in float32 and rounded once, as ``group_norm_sites`` does."""
    if rows.dtype is torch.float32:
        return torch.addcmul(shift, rows, scale)
    return torch.addcmul(shift, rows.float(), scale).to(rows.dtype)
