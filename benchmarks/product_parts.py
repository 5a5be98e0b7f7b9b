"""Do products of few rows get faster in parts? Times of the GEMMs of a sparse step, whole and cut.

The products are those of SD1.5, SD2.1 and SDXL at 5 % area (and some at 15 and 30 %), alone, on several copies of
their weights. ``choose_parts`` (``fisedit_compiler/kernels/matmul_parts.py``) was written from what this printed on an
H200. The sum of the parts is not timed: the kernel that reads the result adds them up.

    python -m benchmarks.product_parts --device cuda
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: make the repository's root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from rich.table import Table

from benchmarks.support.harness import Report, argument_parser, kernel_times, machine, prepare, versions
from fisedit_compiler.kernels.matmul_parts import choose_parts, matmul_parts

PARTS = (1, 2, 3, 4, 5, 6, 8, 9)
COPIED = 160_000_000
"""Bytes of all copies of a weight: several times a GPU's cache."""
SHAPES: dict[str, tuple[int, int, int]] = {
    "sdxl ff out": (128, 5120, 1280),
    "sdxl ff out, 15 %": (352, 5120, 1280),
    "sdxl ff out, 30 %": (640, 5120, 1280),
    "sdxl ff in": (128, 1280, 10240),
    "sdxl attention out": (128, 1280, 1280),
    "sdxl qkv": (128, 1280, 3840),
    "sdxl conv 32": (128, 11520, 1280),
    "sdxl conv 32, 15 %": (352, 11520, 1280),
    "sdxl conv 64": (464, 5760, 640),
    "sdxl conv 128": (1792, 2880, 320),
    "sd21 conv 96": (928, 2880, 320),
    "sd21 conv 48": (256, 5760, 640),
    "sd21 conv 24": (80, 11520, 1280),
    "sd21 conv 12": (32, 11520, 1280),
    "sd21 conv 12, 2560 channels": (32, 23040, 1280),
    "sd21 ff out 48": (256, 2560, 640),
    "sd15 conv 64": (416, 2880, 320),
    "sd15 conv 32": (112, 5760, 640),
}
"""Rows, inputs and outputs by name."""


def measure(name: str, device: torch.device, dtype: torch.dtype, repeats: int, shrink: int = 1) -> dict[str, Any]:
    """Times of one product; ``shrink`` divides its sizes, for a quick look."""
    rows, inputs, outputs = (max(size // shrink, 1) for size in SHAPES[name])
    copies = 1 if device.type == "cpu" else max(2, min(12, COPIED // (inputs * outputs * dtype.itemsize)))
    x = torch.randn(rows, inputs, device=device, dtype=dtype)
    bias = torch.randn(outputs, device=device, dtype=dtype)
    weights = [torch.randn(outputs, inputs, device=device, dtype=dtype) / inputs for _ in range(copies)]
    ways = {"linear": [partial(F.linear, x, weight, bias) for weight in weights]}
    for parts in PARTS:
        if inputs % parts == 0:
            ways[str(parts)] = [partial(matmul_parts, x, weight, parts) for weight in weights]
    times = dict(zip(ways, kernel_times(list(ways.values()), repeats, device), strict=True))
    chosen = choose_parts(inputs, outputs)
    return {
        "product": name,
        "rows": rows,
        "inputs": inputs,
        "outputs": outputs,
        **{f"{way}_us": round(time, 2) for way, time in times.items()},
        "chosen": chosen,
        "ratio": round(times["linear"] / times[str(chosen)], 3),
    }


def draw(rows: list[dict[str, Any]]) -> Table:
    """The rows as a table for people."""
    table = Table(title="products in parts", caption="microseconds; ratio = one linear layer / the chosen parts")
    for column in ("product", "shape", "linear", *map(str, PARTS), "chosen", "ratio"):
        table.add_column(column, justify="left" if column == "product" else "right")
    for row in rows:
        shape = f"{row['rows']} x {row['inputs']} x {row['outputs']}"
        times = (row.get(f"{way}_us") for way in ("linear", *PARTS))
        shown = ("" if time is None else f"{time:.1f}" for time in times)
        table.add_row(row["product"], shape, *shown, str(row["chosen"]), f"{row['ratio']:.2f}x")
    return table


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argument_parser(str(__doc__).splitlines()[0], repeats=7)
    parser.add_argument("--products", nargs="+", choices=SHAPES, default=list(SHAPES), help="which products")
    parser.add_argument("--shrink", type=int, default=1, help="divide all sizes by this, for a quick look")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> Report:
    """Run the benchmark, print and write its report."""
    options = parse(arguments)
    device, dtype = prepare(options)
    settings = {"dtype": str(dtype).removeprefix("torch."), "repeats": options.repeats, "shrink": options.shrink}
    with torch.inference_mode():
        rows = [measure(name, device, dtype, options.repeats, options.shrink) for name in options.products]
    report = Report("product_parts", settings, machine(device), versions(), rows)
    report.publish(draw(rows), options.json)
    return report


if __name__ == "__main__":
    main()
