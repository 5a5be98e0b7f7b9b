"""Arguments for every op, small and right."""

from __future__ import annotations

from typing import Any

import torch

from fisedit_compiler.geometry.inverse_table import inverse_table
from fisedit_compiler.kernels.addresses import address_table
from tests.kernels.tables import Geometry, brute_force_taps, pick


def op_arguments(count: int) -> dict[str, tuple[Any, ...]]:
    """Arguments of every op on a 4x6 lattice with ``count`` active sites."""
    active = pick(24, count)
    ring, taps = brute_force_taps(Geometry(4, 6), active, active)
    places, options = torch.arange(count), ((3, 3), (1, 1), (1, 1))
    x, statistics = torch.randn(2, 8, 4, 6), torch.rand(2, 4, 2)
    rows, canvas = torch.randn(2, count, 8), torch.randn(2, 24, 8)
    heads, head_canvas = torch.randn(2, 2, count, 8), torch.randn(2, 2, 24, 8)
    text, recorded = torch.randn(2, 2, 7, 8), torch.rand(2, 2, count, 9)
    site_sums = torch.randn(2, 24, 4, 2)
    columns = torch.tensor([[0, 1, -1, 8, -1, 2, 3]] * 2)
    return {
        "conv2d_sites": (rows, canvas, ring, taps, places, torch.randn(7, 72), torch.randn(7), *options),
        "convolve": (canvas, taps, places, torch.randn(7, 72), torch.randn(7), *options),
        "convolve_parts": (canvas, taps, places, torch.randn(7, 72), 3, *options),
        "matmul_parts": (torch.randn(count, 8), torch.randn(7, 8), 4),
        "pack_conv_weight": (torch.randn(5, 4, 3, 3),),
        "group_norm_statistics": (x, 4),
        "group_norm_site_sums": (x, statistics, 4),
        "group_norm_row_sums": (rows, statistics),
        "update_statistics": (rows, statistics, site_sums, active),
        "update_statistics_addressed": (
            rows,
            statistics,
            site_sums,
            active,
            address_table([site_sums], torch.device("cpu")),
            0,
            True,
        ),
        "group_norm_sites": (rows, statistics, torch.randn(8), torch.randn(8), 4, 1e-5),
        "attention_sites": (heads, heads, heads, head_canvas, head_canvas, active, None),
        "attention_rows": (heads, heads, heads, active),
        "cross_attention": (heads, text, text),
        "attention_map": (heads, text, None, recorded, columns),
        "attention_with_map": (heads, text, text, recorded, columns),
        "attention_addressed": (
            heads,
            heads,
            heads,
            head_canvas,
            head_canvas,
            active,
            inverse_table(active, 24),
            address_table([head_canvas], torch.device("cpu")),
            0,
            0,
        ),
        "gather_taps": (canvas, taps),
        "gather_sites": (canvas, active, 1),
        "scatter_sites": (rows, canvas, active, 1),
        "recentre_site_sums": (torch.randn(2, 24, 4, 2), statistics, torch.rand(2, 4, 2), 8),
    }
