"""The ops of the sparse program, one per file; importing this package registers ``torch.ops.fisedit``."""

from __future__ import annotations

from fisedit_compiler.kernels.aten import ATEN
from fisedit_compiler.kernels.attention_addressed import attention_addressed
from fisedit_compiler.kernels.attention_map import attention_map
from fisedit_compiler.kernels.attention_rows import attention_rows
from fisedit_compiler.kernels.attention_sites import attention_sites
from fisedit_compiler.kernels.attention_with_map import attention_with_map
from fisedit_compiler.kernels.conv2d_sites import conv2d_sites
from fisedit_compiler.kernels.convolve import convolve
from fisedit_compiler.kernels.convolve_parts import convolve_parts
from fisedit_compiler.kernels.cross_attention import cross_attention
from fisedit_compiler.kernels.gather_sites import gather_sites
from fisedit_compiler.kernels.gather_taps import gather_taps
from fisedit_compiler.kernels.group_norm_site_sums import group_norm_site_sums
from fisedit_compiler.kernels.group_norm_sites import group_norm_sites
from fisedit_compiler.kernels.group_norm_statistics import group_norm_statistics
from fisedit_compiler.kernels.matmul_parts import matmul_parts
from fisedit_compiler.kernels.pack_conv_weight import pack_conv_weight
from fisedit_compiler.kernels.recentre_site_sums import recentre_site_sums
from fisedit_compiler.kernels.registry import KernelError, Op, registered_ops
from fisedit_compiler.kernels.scatter_sites import scatter_sites
from fisedit_compiler.kernels.update_statistics import update_statistics

__all__ = [
    "ATEN",
    "KernelError",
    "Op",
    "attention_addressed",
    "attention_map",
    "attention_rows",
    "attention_sites",
    "attention_with_map",
    "conv2d_sites",
    "convolve",
    "convolve_parts",
    "cross_attention",
    "gather_sites",
    "gather_taps",
    "group_norm_site_sums",
    "group_norm_sites",
    "group_norm_statistics",
    "matmul_parts",
    "pack_conv_weight",
    "recentre_site_sums",
    "registered_ops",
    "scatter_sites",
    "update_statistics",
]
