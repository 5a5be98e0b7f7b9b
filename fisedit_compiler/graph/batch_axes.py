"""Where each value of a captured graph keeps the samples of its batch, and which operation mixes them.

A value either is shared by all samples, or has one axis that counts them in order (``b``, or a multiple of it with the
sample changing slowest, as heads folded into the batch have), or mixes them: it was flipped, summed or attended to
along the batch, or no rule here says otherwise. Edits of several copies, and calls that compute some samples only, are
right only where nothing is mixed. Shapes alone cannot tell: a flipped batch has the same shape.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fisedit_compiler.graph import ir
from fisedit_compiler.graph.signatures import CallSignature
from fisedit_compiler.graph.sizes import BATCH
from fisedit_compiler.graph.specs import ValueSpec, has_spec, spec_of
from fisedit_compiler.graph.views import VIEWS, order_of, view_groups

aten = torch.ops.aten


@dataclass(frozen=True)
class Mixed:
    """Samples cannot be told apart; ``reason`` names the operation that mixed them."""

    reason: str


Samples = int | Mixed | None
"""The axis that counts samples, ``None`` for what all samples share."""


def samples_of(graph: fx.Graph, signature: CallSignature) -> dict[fx.Node, Samples]:
    """The samples of every tensor of a captured graph; of an operation with several results one entry for all."""
    batched = {spec.identifier() for spec in signature.tensors if spec.axes and spec.axes[0] == "b"}
    found: dict[fx.Node, Samples] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            found[node] = 0 if node.name in batched else None
        elif node.op == "get_attr":
            found[node] = None
        elif node.op == "call_function" and "expr" not in node.meta:
            found[node] = _of_call(node, found)
    return found


def mixed(graph: fx.Graph, signature: CallSignature) -> str | None:
    """What mixes the samples first, in words, or ``None`` if nothing does."""
    return next((item.reason for item in samples_of(graph, signature).values() if isinstance(item, Mixed)), None)


def _of_call(node: fx.Node, found: dict[fx.Node, Samples]) -> Samples:
    operands = {source: found[source] for source in node.all_input_nodes if source in found}
    for samples in operands.values():
        if isinstance(samples, Mixed):
            return samples
    batched = {source: axis for source, axis in operands.items() if isinstance(axis, int)}
    counts = any("expr" in source.meta and BATCH in source.meta["expr"].free_symbols for source in node.all_input_nodes)
    if node.target is operator.getitem:
        return next(iter(batched.values()), None)
    if not batched:
        return _of_shared(node, counts)
    if counts and node.target not in _TAKE_SIZES:
        return Mixed(f"{ir.describe(node)} computes with the size of the batch")
    rule = RULES.get(node.target) or (_aligned if _is_pointwise(node.target) else None)
    axis = rule(node, batched) if rule else None
    if axis is None:
        return Mixed(f"{ir.describe(node)} mixes the samples of a batch, or no rule says that it does not")
    return axis


def _of_shared(node: fx.Node, counts: bool) -> Samples:
    """Of a value without samples: repeated for all of them, or still without."""
    shapes = [spec.shape for spec in _specs(node)]
    axes = [axis for shape in shapes for axis, size in enumerate(shape) if BATCH in size.free_symbols]
    if not axes and not counts:
        return None
    if len(axes) == 1 and len(shapes) == 1 and node.target in _REPEATS:
        return axes[0]
    return Mixed(f"{ir.describe(node)} counts the samples of a batch")


def _specs(node: fx.Node) -> tuple[ValueSpec, ...]:
    spec = node.meta.get("spec", ())
    return spec if isinstance(spec, tuple) else (spec,)


# -- rules: the axis of the result's samples, None where they are mixed ----------------------------------------------

Rule = Callable[[fx.Node, dict[fx.Node, int]], int | None]


def _is_pointwise(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def _from_behind(batched: dict[fx.Node, int]) -> set[int]:
    return {axis - spec_of(source).rank for source, axis in batched.items()}


def _aligned(node: fx.Node, batched: dict[fx.Node, int]) -> int | None:
    """Operands broadcast against each other: the same axis, counted from behind."""
    axes = _from_behind(batched)
    return axes.pop() + spec_of(node).rank if len(axes) == 1 else None


def _leading(untouched_behind: int) -> Rule:
    """The operation mixes its last ``untouched_behind`` axes, of its first operand alone."""

    def rule(node: fx.Node, batched: dict[fx.Node, int]) -> int | None:
        source = node.args[0]
        if set(batched) != {source}:
            return None
        axis = batched[source]  # type: ignore[index]
        return axis if axis < spec_of(source).rank - untouched_behind else None  # type: ignore[arg-type]

    return rule


def _first(rank: int) -> Rule:
    """Samples are the first axis of ``rank`` (0: of any) axes of the first operand."""

    def rule(node: fx.Node, batched: dict[fx.Node, int]) -> int | None:
        source: Any = node.args[0]
        return 0 if batched == {source: 0} and rank in (0, spec_of(source).rank) else None

    return rule


def _norm(node: fx.Node, batched: dict[fx.Node, int]) -> int | None:
    return _leading(len(node.args[1]))(node, batched)  # type: ignore[arg-type]


def _padding(node: fx.Node, batched: dict[fx.Node, int]) -> int | None:
    return _leading(len(node.args[1]) // 2)(node, batched)  # type: ignore[arg-type]


def _products(node: fx.Node, batched: dict[fx.Node, int]) -> int | None:
    """Matrix products and attention: samples lie in front of the matrices, or are rows of the first."""
    axes = _from_behind(batched)
    if len(axes) != 1 or min(spec_of(source).rank for source in batched) < 2:
        return None
    axis, rank = axes.pop(), spec_of(node).rank
    rows = set(batched) == {node.args[0]} and node.target not in _ATTENTION and axis == -2
    vector = any(has_spec(item) and spec_of(item).rank < 2 for item in node.args)  # type: ignore[arg-type]
    return axis + rank if not vector and (axis <= -3 or rows) else None


def _along(position: int, default: Any = None) -> Rule:
    """The operation runs along the axes at ``position`` of its arguments, which it may take away."""

    def rule(node: fx.Node, batched: dict[fx.Node, int]) -> int | None:
        ranks = {spec_of(source).rank for source in batched}
        found: Any = node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)
        if len(ranks) != 1 or len(set(batched.values())) != 1 or found is None or found == []:
            return None
        (rank,), axis = ranks, next(iter(batched.values()))
        axes = [int(item) % rank for item in (found if isinstance(found, (list, tuple)) else [found])]
        if axis in axes:
            return None
        after = {spec.rank for spec in _specs(node)}
        return axis if after == {rank} else axis - sum(gone < axis for gone in axes)

    return rule


def _view(node: fx.Node, batched: dict[fx.Node, int]) -> int | None:
    ((source, axis),) = batched.items()
    before, after = spec_of(source).shape, spec_of(node).shape
    for left, right in view_groups(before, after) or ():
        if axis not in left:
            continue
        slowest = next((item for item in left if before[item] != 1), None)
        target = next((item for item in right if after[item] != 1), None)
        if slowest != axis or target is None or (after[target] / BATCH).is_integer is not True:
            return None
        return target
    return None


def _permuted(node: fx.Node, batched: dict[fx.Node, int]) -> int | None:
    ((source, axis),) = batched.items()
    return order_of(node, spec_of(source).rank).index(axis)


def _unsqueeze(node: fx.Node, batched: dict[fx.Node, int]) -> int | None:
    ((_, axis),) = batched.items()
    dim: Any = node.args[1]
    return axis + int(dim % spec_of(node).rank <= axis)


def _squeeze(node: fx.Node, batched: dict[fx.Node, int]) -> int | None:
    ((source, axis),) = batched.items()
    dims: Any = node.args[1]
    shape = spec_of(source).shape
    gone = {int(dim) % len(shape) for dim in (dims if isinstance(dims, (list, tuple)) else [dims])}
    return axis - sum(1 for dim in gone if dim < axis and shape[dim] == 1)


def _stack(node: fx.Node, batched: dict[fx.Node, int]) -> int | None:
    axes = set(batched.values())
    dim: Any = node.args[1] if len(node.args) > 1 else 0
    axis = axes.pop()
    return axis + int(dim % spec_of(node).rank <= axis) if not axes else None


def _index_of(node: fx.Node, batched: dict[fx.Node, int]) -> int | None:
    """Rows of a table that all samples share."""
    return batched[node.args[1]] if set(batched) == {node.args[1]} else None  # type: ignore[index]


def _overloads(names: Iterable[str]) -> list[Any]:
    packets = [getattr(aten, name) for name in names if hasattr(aten, name)]
    return [getattr(packet, overload) for packet in packets for overload in packet.overloads()]


def _table(groups: Iterable[tuple[Rule, str]]) -> dict[Any, Rule]:
    return {operation: rule for rule, names in groups for operation in _overloads(names.split())}


_REPEATS = frozenset(
    _overloads(
        [
            "expand",
            "repeat",
            "full",
            "zeros",
            "ones",
            "empty",
            "full_like",
            "zeros_like",
            "ones_like",
            "new_zeros",
            "new_ones",
            "new_full",
        ]
    )
)
_TAKE_SIZES = frozenset(
    {*VIEWS, *_REPEATS, *_overloads(["slice", "narrow", "split_with_sizes", "split", "expand_as", "view_as"])}
)
_ATTENTION = frozenset(_overloads(["scaled_dot_product_attention"]))
RULES: dict[Any, Rule] = {
    **dict.fromkeys(VIEWS, _view),
    **_table(
        (
            (
                _aligned,
                "clone contiguous detach alias to _to_copy type_as lift_fresh_copy dropout expand real imag copy",
            ),
            (_aligned, "zeros_like ones_like full_like silu gelu relu mish softplus where masked_fill prelu tril triu"),
            (_leading(1), "linear"),
            (_leading(2), "avg_pool2d max_pool2d max_pool2d_with_indices adaptive_avg_pool2d adaptive_max_pool2d"),
            (_leading(3), "pixel_shuffle pixel_unshuffle"),
            (_norm, "layer_norm rms_norm"),
            (_padding, "constant_pad_nd pad reflection_pad1d reflection_pad2d replication_pad2d replication_pad1d"),
            (_first(4), "conv2d conv_transpose2d upsample_nearest2d _upsample_nearest_exact2d upsample_bilinear2d"),
            (_first(4), "upsample_bicubic2d _upsample_bilinear2d_aa im2col"),
            (_first(3), "conv1d conv_transpose1d upsample_nearest1d upsample_linear1d"),
            (_first(0), "group_norm batch_norm instance_norm mm"),
            (_products, "matmul bmm scaled_dot_product_attention"),
            (_along(1), "softmax _softmax log_softmax mean sum amax amin cumsum flip select slice narrow prod"),
            (_along(1), "logsumexp var std unbind cat index_select unfold argmax argmin any all fft_fftshift"),
            (_along(1), "fft_ifftshift"),
            (_along(1, -1), "glu sort topk"),
            (_along(2), "chunk split split_with_sizes roll slice_scatter linalg_vector_norm fft_fftn fft_ifftn"),
            (_permuted, "permute transpose swapaxes swapdims mT movedim"),
            (_unsqueeze, "unsqueeze"),
            (_squeeze, "squeeze"),
            (_stack, "stack"),
            (_index_of, "embedding"),
        )
    ),
}
# `cat`, `slice` and `select` run along the first axis unless told otherwise, `topk` along the axis behind its count.
RULES.update(
    {operation: _along(1, 0) for operation in _overloads(["cat", "concat", "concatenate", "slice", "select", "unbind"])}
)
RULES.update(
    {operation: _along(2, 0) for operation in _overloads(["chunk", "split", "split_with_sizes", "slice_scatter"])}
)
RULES.update({operation: _along(2, -1) for operation in _overloads(["topk"])})
