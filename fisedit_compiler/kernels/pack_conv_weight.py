"""``fisedit::pack_conv_weight``: a convolution's weight in the order in which ``conv2d_sites`` reads it."""

from __future__ import annotations

import torch
from torch import Tensor

from fisedit_compiler.kernels.registry import define_op, require
from fisedit_compiler.kernels.traits import OpTraits, no_products

_NAME = "pack_conv_weight"


def _reference(weight: Tensor) -> Tensor:
    require(weight.dim() == 4, _NAME, lambda: f"weight must be [O, C, kh, kw], got {weight.dim()} dimensions")
    # clone, because reshape would hand the permutation of a 1x1 kernel through as a view.
    packed = weight.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
    return packed.view(weight.shape[0], -1)


def _fake(weight: Tensor) -> Tensor:
    require(weight.dim() == 4, _NAME, lambda: f"weight must be [O, C, kh, kw], got {weight.dim()} dimensions")
    out_channels, channels, height, width = weight.shape
    return weight.new_empty(out_channels, height * width * channels)


_OP = define_op(f"{_NAME}(Tensor weight) -> Tensor", _reference, _fake, traits=OpTraits(flops=no_products))


def pack_conv_weight(weight: Tensor) -> Tensor:
    """``[O, C, kh, kw]`` to contiguous ``[O, kh*kw*C]``: per output tap-major, tap ``i*kw + j``, then input channel.

    That is a linear layer's weight for gathered taps, and the memory of a channels-last ``[O, C, kh, kw]`` for patches.

    Raises:
        KernelError: the weight does not have four dimensions.
    """
    return _OP(weight)
