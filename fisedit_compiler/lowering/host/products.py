"""Give products of rows and weights to oneDNN, with weights packed once.

Before: ``linear(rows, weight, bias)``
After:  ``product(rows, packed_weight, bias)``
Before: ``conv2d_sites(rows, canvas, ring, taps, places, weight, bias, ...)``
After:  ``convolution(rows, canvas, ring, taps, places, weight, bias, ..., packed_weight)``

A step's products have few rows, so a GEMM that brings the weight into its own order at every call spends much of its
time on that. Their order of sums is another one: last bits differ from ``linear``'s, inside the mask. As with
``linear``, a row's bits depend on no other row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fisedit_compiler.graph.specs import ValueSpec
from fisedit_compiler.kernels.conv2d_sites import readable_values
from fisedit_compiler.kernels.convolve import check_lines, convolve
from fisedit_compiler.lowering.host.named import compute_by
from fisedit_compiler.lowering.host.prepared import Preparation, Recipe, Weight

LINEAR = torch.ops.aten.linear.default
CONVOLUTION = torch.ops.fisedit.conv2d_sites.default
_WEIGHT_AT = {LINEAR: 1, CONVOLUTION: 5}
MOST_BYTES = 2**30
"""Of packed weights: they are kept beside the module's own. What comes later in the graph stays as it is."""
_FEW_OUTPUTS = 16
"""Below which a product is no work for a blocked kernel."""
_MANY_INPUTS, _MANY_ELEMENTS = 512, 40_000
"""Weights that are as large in one of the two are packed. A call with a packed weight takes 12 us longer to begin."""
_MEASURED = frozenset({"AVX512"})
"""Instruction sets of CPUs on which packed products were measured to be faster."""


def pack_products(preparation: Preparation) -> None:
    """Change the products of a graph that :func:`is_worth_it` where it runs."""
    left = MOST_BYTES
    packed: set[Weight] = set()
    for node in list(preparation.graph.nodes):
        position = _WEIGHT_AT.get(node.target)
        if position is not None and _is_float32(node.args[0]) and not node.kwargs:
            left = _pack(preparation, node, position, left, packed)


def is_worth_it() -> bool:
    """Whether this CPU and this torch are of those on which packed products were measured to be faster."""
    mkldnn = torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()  # type: ignore[attr-defined]
    return mkldnn and torch.backends.cpu.get_cpu_capability() in _MEASURED


def _is_float32(node: Any) -> bool:
    spec = node.meta.get("spec") if isinstance(node, fx.Node) else None
    return isinstance(spec, ValueSpec) and spec.dtype is torch.float32 and spec.rank > 1


def _pack(preparation: Preparation, node: fx.Node, position: int, left: int, packed: set[Weight]) -> int:
    """Change a node whose argument at ``position`` is its weight; gives how many bytes are left to pack after that."""
    weight = preparation.weight(node.args[position])
    if weight is None or not _is_packable(preparation.value(weight)):
        return left
    nbytes = 0 if weight in packed else preparation.value(weight).nbytes
    if nbytes > left:
        return left
    packed.add(weight)
    values = preparation.placeholder(Recipe(pack_weight, (weight,)), "packed_weight")
    if node.target is LINEAR:
        node.args = (node.args[0], values, node.args[2] if len(node.args) > 2 else None)
        compute_by(product, node)
    else:
        node.args = (*node.args, values)
        compute_by(convolution, node)
    return left - nbytes


def _is_packable(weight: Any) -> bool:
    if type(weight) not in (Tensor, torch.nn.Parameter) or weight.layout is not torch.strided:
        return False
    plain = weight.is_cpu and weight.dtype is torch.float32 and weight.dim() == 2
    if not plain or weight.shape[0] < _FEW_OUTPUTS:
        return False
    return weight.shape[1] >= _MANY_INPUTS or weight.numel() >= _MANY_ELEMENTS


def pack_weight(weight: Tensor) -> Tensor:
    """A weight ``[O, I]`` in oneDNN's own order."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
    return packed


_LINEAR = torch.ops.mkldnn._linear_pointwise.default


def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``linear`` with a weight of :func:`pack_weight`."""
    result: Tensor = _LINEAR(rows, weight, bias, "none", [], "")
    return result


def convolution(
    rows: Tensor, canvas: Tensor, ring: Tensor, taps: Tensor, places: Tensor, weight: Tensor, bias: Tensor | None,
    kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], packed: Tensor,
) -> Tensor:  # fmt: skip
    """``conv2d_sites``; a table of taps is read with the weight of :func:`pack_weight`, patches with the plain one."""
    values = readable_values(rows, canvas, ring)
    if taps.shape[1] != kernel[0] * kernel[1]:
        return convolve(values, taps, places, weight, bias, kernel, stride, dilation)
    check_lines("conv2d_sites", taps, places)
    batch, _, channels = values.shape
    gathered = values.index_select(1, taps.view(-1)).view(batch * taps.shape[0], taps.shape[1] * channels)
    return product(gathered, packed, bias).view(batch, places.shape[0], weight.shape[0])
