"""``fisedit::convolve``: a convolution whose inputs lie in one tensor and are found through an index table.

The table says by its number of columns how the outputs are computed: through their taps (block size 1, one GEMM), or
in blocks that read a patch each (a convolution without padding). Which of the two is decided when the op runs, so a
step that was compiled once serves plans with any block sizes. On a GPU a block size may be served by an implicit GEMM
instead, where that was measured to be faster (``block_costs.json``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

from fisedit_compiler.geometry.block_costs import fits
from fisedit_compiler.geometry.patches import BLOCK_SIZES, block_size_of, output_taps, patch_shape
from fisedit_compiler.kernels.formulas import sites_convolution_flops
from fisedit_compiler.kernels.gather_taps import gather_taps
from fisedit_compiler.kernels.providers import ROUNDED, Provider
from fisedit_compiler.kernels.registry import define_op, require
from fisedit_compiler.kernels.traits import OpTraits

_NAME = "convolve"
_FEW_OUTPUTS = 16
"""Outputs below which a GPU reads through the table instead of gathering: 8 instead of 12.6 us for a latent's 4."""
_GATHERED = f"in blocks of this size and for {_FEW_OUTPUTS} outputs or more, gathering was measured to be faster"


def check_weight(op: str, weight: Tensor, channels: int, kernel: Sequence[int]) -> None:
    """Refuse a weight that is not packed, or is another convolution's.

    Raises:
        KernelError: the weight does not fit.
    """
    require(
        weight.dim() == 2,
        op,
        lambda: f"weight must be [O, K*C], got {weight.dim()} dimensions; pack the weight with pack_conv_weight",
    )
    require(
        weight.shape[1] == kernel[0] * kernel[1] * channels,
        op,
        lambda: (
            f"weight has {weight.shape[1]} inputs an output, but {kernel[0]}x{kernel[1]} taps of {channels} channels "
            f"make {kernel[0] * kernel[1] * channels}; pack the weight, and take taps of the same convolution"
        ),
    )


def check_table(op: str, taps: Tensor, places: Tensor) -> None:
    """Refuse tables of the wrong rank.

    Raises:
        KernelError: a table has the wrong number of dimensions.
    """
    require(
        taps.dim() == 2 and places.dim() == 1,
        op,
        lambda: f"taps must be [blocks, p*p] and places [N], got {taps.dim()} and {places.dim()} dimensions",
    )


def check_lines(op: str, taps: Tensor, places: Tensor) -> None:
    """Refuse a table of taps, not of patches, with another number of lines than there are outputs.

    Raises:
        KernelError: the numbers differ.
    """
    require(
        taps.shape[0] == places.shape[0],
        op,
        lambda: f"a table of taps has a line per output, but there are {taps.shape[0]} lines and {len(places)} places",
    )


def _check(values: Tensor, taps: Tensor, places: Tensor, weight: Tensor, kernel: Sequence[int]) -> None:
    require(values.dim() == 3, _NAME, lambda: f"values must be [B, T, C], got {values.dim()} dimensions")
    check_table(_NAME, taps, places)
    check_weight(_NAME, weight, int(values.shape[2]), kernel)


def _reference(
    values: Tensor, taps: Tensor, places: Tensor, weight: Tensor, bias: Tensor | None,
    kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    _check(values, taps, places, weight, kernel)
    batch, _, channels = values.shape
    blocks, columns = taps.shape
    size = block_size_of(columns, kernel, stride, dilation)
    require(size is not None, _NAME, lambda: _no_size(columns, kernel, stride, dilation))
    assert size is not None
    if size == 1:
        check_lines(_NAME, taps, places)
    elif values.is_cuda and values.dtype is torch.float32:
        # cuDNN would round to tf32; float32 on a GPU is for comparing, so every output gathers its own taps.
        taps, size = output_taps(taps, places, size, kernel, stride, dilation), 1
    gathered = gather_taps(values, taps)
    if size == 1:
        return F.linear(gathered, weight, bias).reshape(batch, places.shape[0], weight.shape[0])
    if blocks == 0:
        return values.new_empty(batch, 0, weight.shape[0])
    height, width = patch_shape(size, kernel, stride, dilation)
    patches = gathered.view(batch * blocks, height, width, channels).permute(0, 3, 1, 2)
    filters = weight.view(weight.shape[0], kernel[0], kernel[1], channels).permute(0, 3, 1, 2)
    out = F.conv2d(patches, filters, bias, list(stride), 0, list(dilation))
    outputs = out.permute(0, 2, 3, 1).reshape(batch, blocks * size * size, weight.shape[0])
    return gather_taps(outputs, places[:, None]).view(batch, places.shape[0], weight.shape[0])


def _no_size(columns: int, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> str:
    known = {size: patch_shape(size, kernel, stride, dilation) for size in BLOCK_SIZES}
    shown = ", ".join(f"{height * width} (size {size})" for size, (height, width) in known.items())
    return f"the table has {columns} columns, but this convolution's blocks read {shown}; take tables of the same one"


def _fake(
    values: Tensor, taps: Tensor, places: Tensor, weight: Tensor, bias: Tensor | None,
    kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    _check(values, taps, places, weight, kernel)
    return values.new_empty(values.shape[0], places.shape[0], weight.shape[0])


def _flops(args: list[Any], out: Any) -> sympy.Expr:
    return sites_convolution_flops(args[3], args[5], out)


def _supports(
    values: Tensor, taps: Tensor, places: Tensor, weight: Tensor, bias: Tensor | None,
    kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int],
) -> Literal[True] | str:  # fmt: skip
    if values.dtype not in (torch.float16, torch.bfloat16):
        return ROUNDED
    size = block_size_of(taps.shape[1], kernel, stride, dilation)
    # A gather of taps for a handful of outputs (a picture's channels) costs more than the convolution.
    if size == 1 and weight.shape[0] < _FEW_OUTPUTS:
        return True
    fitted = fits("cuda").get(size or 0)
    if fitted is not None and fitted.path == "implicit":
        return True
    return _GATHERED


@cache
def _triton() -> Callable[..., Tensor]:
    """Triton is there only where a GPU is; looked up once, since an import statement takes a microsecond each time."""
    from fisedit_compiler.kernels.triton.convolve import convolve

    return convolve


def _implicit_gemm(
    values: Tensor, taps: Tensor, places: Tensor, weight: Tensor, bias: Tensor | None,
    kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    _check(values, taps, places, weight, kernel)
    return _triton()(values, taps, places, weight, bias, kernel, stride, dilation)


_OP = define_op(
    f"{_NAME}(Tensor values, Tensor taps, Tensor places, Tensor weight, Tensor? bias, "
    "int[2] kernel, int[2] stride, int[2] dilation) -> Tensor",
    _reference,
    _fake,
    traits=OpTraits(flops=_flops),
    providers=[Provider("triton", "CUDA", _implicit_gemm, _supports)],
)


def gathered(
    values: Tensor, taps: Tensor, places: Tensor, weight: Tensor, bias: Tensor | None,
    kernel: Sequence[int], stride: Sequence[int] = (1, 1), dilation: Sequence[int] = (1, 1),
) -> Tensor:  # fmt: skip
    """The op by its reference, which gathers what it reads, on any device: for measuring it beside other ways."""
    return _reference(values, taps, places, weight, bias, list(kernel), list(stride), list(dilation))


def convolve(
    values: Tensor, taps: Tensor, places: Tensor, weight: Tensor, bias: Tensor | None,
    kernel: Sequence[int], stride: Sequence[int] = (1, 1), dilation: Sequence[int] = (1, 1),
) -> Tensor:  # fmt: skip
    """Outputs of a convolution at some sites.

    Args:
        values: ``[B, T, C]``, everything the convolution may read.
        taps: int64 ``[blocks, p*p]`` into the ``T`` sites: the patch of every block of ``b`` by ``b`` outputs, row by
            row (``geometry/patches.py``). For ``b`` = 1 the taps of every output, ``[N, K]``.
        places: int64 ``[N]`` into the ``blocks*b*b`` outputs of the blocks: which of them are wanted. For ``b`` = 1
            all are, in order, and only the length is read.
        weight: packed by ``pack_conv_weight``, ``[O, K*C]``.
        bias: ``[O]`` or ``None``.
        kernel: height and width of the kernel, ``K`` their product.
        stride: stride along height and width.
        dilation: dilation along height and width.

    Returns:
        ``[B, N, O]``, contiguous, of the dtype of ``values``.

    Raises:
        KernelError: weight or table do not fit the convolution, or a tensor has the wrong number of dimensions.
    """
    return _OP(values, taps, places, weight, bias, list(kernel), list(stride), list(dilation))
