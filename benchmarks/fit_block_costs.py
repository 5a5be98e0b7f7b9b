"""What does a convolution cost in blocks of 1, 2, 4 and 8? Measures real shapes and fits the package's cost model.

The convolutions of whole UNets are timed with random weights on the tables of real plans (compact, scattered and thin
masks), alone, as the sparse step runs them. The coefficients of ``fisedit_compiler.geometry.block_costs`` are fitted as
non-negative numbers with the least relative errors, per block size and path; where a size has several paths, the
one that is faster in sum is used. The result goes to the package's file, in the place of the same device's fits.

    python -m benchmarks.fit_block_costs --device cuda
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: make the repository's root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.optimize import nnls
from torch import Tensor

import fisedit_compiler.geometry.block_costs as packaged
from benchmarks.support.harness import kernel_times, machine, positive, prepare, versions
from benchmarks.support.subjects import EMBEDDED_CONFIG, UNETS, scattered_mask, square_mask, thin_mask
from fisedit_compiler.geometry.block_costs import FEATURES, TERMS
from fisedit_compiler.geometry.block_sizes import ConvLayer
from fisedit_compiler.geometry.conv_tables import ConvKey
from fisedit_compiler.geometry.patches import BLOCK_SIZES
from fisedit_compiler.geometry.site_plan import SitePlan
from fisedit_compiler.kernels.convolve import gathered
from fisedit_compiler.kernels.convolve_parts import convolve_parts
from fisedit_compiler.kernels.matmul_parts import choose_parts

PACKAGE_FILE = Path(packaged.__file__).with_name(packaged.FILE)
CONFIGS = {"emoji-scenes": EMBEDDED_CONFIG, **UNETS}
MODELS = {"cpu": ("emoji-scenes", "sd15"), "cuda": ("emoji-scenes", "sd15", "sd21", "sdxl")}
LARGEST = {"cpu": 1.5e9, "cuda": 1e13}
"""Operations of the largest convolution that is measured, so that a processor is done in minutes."""
BATCH = 2


@dataclass(frozen=True)
class Point:
    """One measured time.

    Attributes:
        path: how it was computed, see ``Fitted.path``.
        size: block size.
        features: by name of a symbol of the cost model.
        microseconds: its time: on a GPU the median of the repeats, on a processor the least.
    """

    path: str
    size: int
    features: Mapping[str, float]
    microseconds: float


def unet_layers(config: Mapping[str, Any]) -> list[ConvLayer]:
    """The convolutions larger than 1x1 of a ``UNet2DConditionModel``, in order of computation."""
    channels: Sequence[int] = config["block_out_channels"]
    per_block: int = config["layers_per_block"]
    layers: list[ConvLayer] = []

    def conv(level: int, inputs: int, outputs: int, *, stride: int = 1, upsample: int = 1) -> None:
        source = Fraction(level * upsample, stride)
        key = ConvKey(source, Fraction(level), (3, 3), (stride, stride), (1, 1), upsample=upsample)
        layers.append(ConvLayer(key, inputs, outputs))

    def resnet(level: int, inputs: int, outputs: int) -> None:
        conv(level, inputs, outputs)
        conv(level, outputs, outputs)

    conv(1, config["in_channels"], channels[0])
    skips, width, level = [channels[0]], channels[0], 1
    for number, outputs in enumerate(channels):
        for _ in range(per_block):
            resnet(level, width, outputs)
            width = outputs
            skips.append(width)
        if number < len(channels) - 1:
            level *= 2
            conv(level, width, width, stride=2)
            skips.append(width)
    resnet(level, width, width)
    resnet(level, width, width)
    for number, outputs in enumerate(reversed(channels)):
        for _ in range(per_block + 1):
            resnet(level, width + skips.pop(), outputs)
            width = outputs
        if number < len(channels) - 1:
            level //= 2
            conv(level, width, width, upsample=2)
    conv(1, width, config["out_channels"])
    return layers


def masks(side: int) -> list[Tensor]:
    """Compact, scattered and thin masks of a square latent."""
    compact = [square_mask(fraction, side, side) for fraction in (0.05, 0.3)]
    return [*compact, scattered_mask(0.04, side, side), thin_mask(side, side)]


def paths(device: torch.device) -> dict[str, tuple[int, ...]]:
    """The ways to compute a convolution on a device, and the block sizes each is measured for.

    The implicit GEMM reads through its table, so it copies nothing and skips outputs that nobody asked for whatever the
    size: larger blocks would time the same work again.
    """
    gathering: dict[str, tuple[int, ...]] = {"taps": (1,), "patches": BLOCK_SIZES[1:]}
    return {**gathering, "implicit": (1,)} if device.type == "cuda" else gathering


def measure(models: Sequence[str], device: torch.device, dtype: torch.dtype, repeats: int) -> list[Point]:
    """Times of every distinct convolution of the models on every mask, in blocks of every size."""
    points: list[Point] = []
    seen: set[tuple[Any, ...]] = set()
    for model in models:
        config = CONFIGS[model]
        layers = dict.fromkeys(unet_layers(config))
        for mask in masks(config["sample_size"]):
            plan = SitePlan.build(mask, (), {layer.key for layer in layers})
            plans = {size: plan.blocked(dict.fromkeys(plan.active, size)) for size in BLOCK_SIZES}
            for layer in layers:
                rows = plan.rows(layer.key.target)
                shape = (layer.key.stride, layer.key.upsample, layer.channels, layer.out_channels, rows)
                if shape not in seen:
                    seen.add(shape)
                    points += measure_layer(layer, plans, device, dtype, repeats)
            if device.type == "cuda":
                torch.cuda.empty_cache()
        print(f"{model}: {len(points)} times", flush=True)
    return points


def measure_layer(
    layer: ConvLayer, plans: Mapping[int, SitePlan], device: torch.device, dtype: torch.dtype, repeats: int
) -> list[Point]:
    """Times of one convolution, its ways in turn."""
    runs: list[tuple[str, int, dict[str, float], list[Callable[[], Any]]]] = []
    for path, sizes in paths(device).items():
        for size in sizes:
            features = features_of(layer, plans[size], size, dtype)
            if term_values(features)["operations"] <= LARGEST[device.type]:
                runs.append((path, size, features, calls(layer, plans[size], path, device, dtype)))
    times = kernel_times([functions for *_, functions in runs], repeats, device)
    return [Point(path, size, features, found) for (path, size, features, _), found in zip(runs, times, strict=True)]


def features_of(layer: ConvLayer, plan: SitePlan, size: int, dtype: torch.dtype) -> dict[str, float]:
    """The symbols of the cost model for one convolution of a plan."""
    height, width = layer.key.patch(size)
    features: dict[str, float] = {
        "batch": BATCH,
        "rows": plan.rows(layer.key.target),
        "blocks": plan.taps[layer.key].shape[0],
        "outputs": size * size,
        "patch": height * width,
        "taps": layer.key.kernel[0] * layer.key.kernel[1],
        "channels": layer.channels,
        "out_channels": layer.out_channels,
        "element": dtype.itemsize,
    }
    assert features.keys() == {str(symbol) for symbol in FEATURES}
    return features


def calls(
    layer: ConvLayer, plan: SitePlan, path: str, device: torch.device, dtype: torch.dtype
) -> list[Callable[[], Any]]:
    """The convolution, ready to run; on a GPU on several copies of its weight, which the cache cannot hold at once."""
    function: Callable[..., Tensor] = gathered
    if path == "implicit":
        from fisedit_compiler.kernels.triton.convolve import convolve as function
    key = layer.key
    sites = plan.rows(key.source) + plan.ring[key].shape[0] + 1
    weight_bytes = layer.channels * layer.out_channels * 9 * dtype.itemsize
    copies = 1 if device.type == "cpu" else max(2, min(10, 150_000_000 // weight_bytes))
    values = torch.randn(BATCH, sites, layer.channels, device=device, dtype=dtype)
    weights = torch.randn(copies, layer.out_channels, 9 * layer.channels, device=device, dtype=dtype) / layer.channels
    bias = torch.randn(layer.out_channels, device=device, dtype=dtype)
    taps, places = plan.taps[key].to(device), plan.places[key.target].to(device)
    parts = choose_parts(9 * layer.channels, layer.out_channels)
    if path != "implicit" and device.type == "cuda" and parts > 1:
        # As lowering/cut_products.py has it; the sum of the parts is fused into the next kernel.
        return [
            partial(convolve_parts, values, taps, places, weight, parts, key.kernel, key.stride, key.dilation)
            for weight in weights
        ]
    return [
        partial(function, values, taps, places, weight, bias, key.kernel, key.stride, key.dilation)
        for weight in weights
    ]


def fit(points: Sequence[Point], device: str, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of the package's file for one device type."""
    groups: dict[tuple[int, str], list[Point]] = {}
    for point in points:
        groups.setdefault((point.size, point.path), []).append(point)
    entries = []
    for (size, path), group in sorted(groups.items()):
        rivals = {other: sum(p.microseconds for p in found) for (s, other), found in groups.items() if s == size}
        coefficients = fit_terms(group)
        errors = sorted(abs(estimate(coefficients, point) / point.microseconds - 1) for point in group)
        entries.append(
            {
                "device": device,
                "size": size,
                "path": path,
                "used": min(rivals, key=rivals.__getitem__) == path,
                "coefficients": coefficients,
                "times": len(group),
                "sum_ms": round(sum(point.microseconds for point in group) / 1e3, 3),
                "median_error": round(statistics.median(errors), 3),
                "largest_error": round(errors[-1], 3),
                "measured_on": dict(facts),
            }
        )
    return entries


def fit_terms(points: Sequence[Point]) -> dict[str, float]:
    """Non-negative coefficients of the cost model's terms with the least sum of absolute relative errors.

    Found by repeated weighted least squares: a time that something else on the machine disturbed moves it little.
    """
    terms = np.array([list(term_values(point.features).values()) for point in points])
    relative = terms / np.array([point.microseconds for point in points])[:, None]
    scale = relative.max(axis=0)
    weights = np.ones(len(points))
    for _ in range(30):
        solution, _ = nnls(relative / scale * weights[:, None], weights)
        weights = 1 / np.sqrt(np.maximum(np.abs(relative / scale @ solution - 1), 0.01))
    return {name: float(f"{value:.6g}") for name, value in zip(TERMS, solution / scale, strict=True)}


def term_values(features: Mapping[str, float]) -> dict[str, float]:
    """What each coefficient is multiplied by, by its name."""
    symbols = {symbol: features[str(symbol)] for symbol in FEATURES}
    return {name: float(term.subs(symbols)) for name, term in TERMS.items()}


def estimate(coefficients: Mapping[str, float], point: Point) -> float:
    """Microseconds by the fitted model."""
    return float(packaged.Fitted(point.size, point.path, coefficients).microseconds(point.features))


def merged(entries: Sequence[Mapping[str, Any]], known: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of the package's file: ``known`` with the fits of the measured devices in their place."""
    measured = {entry["device"] for entry in entries}
    kept = [entry for entry in known["fits"] if entry["device"] not in measured]
    fits = sorted([*kept, *entries], key=lambda entry: (entry["device"], entry["size"], entry["path"]))
    return {"written_by": "python -m benchmarks.fit_block_costs", "fits": fits}


def draw(entries: Sequence[Mapping[str, Any]]) -> Table:
    """The fits as a table for people."""
    table = Table(title="cost of blocks", caption="sum over the measured times; errors of the fit, relative")
    for column in ("device", "size", "path", "used", "times", "sum ms", "median error", "largest"):
        table.add_column(column, justify="left" if column in ("device", "path", "used") else "right")
    for entry in entries:
        table.add_row(
            entry["device"], str(entry["size"]), entry["path"], "yes" if entry["used"] else "", str(entry["times"]),
            f"{entry['sum_ms']:.1f}", f"{entry['median_error']:.0%}", f"{entry['largest_error']:.0%}",
        )  # fmt: skip
    return table


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--device", default="cpu", help="where to run: cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: float32 on a CPU")
    parser.add_argument("--models", nargs="+", choices=sorted(CONFIGS), help="default: all that the device can")
    parser.add_argument("--threads", type=positive, help="CPU threads; default: what torch chooses")
    parser.add_argument("--repeats", type=positive, default=7, help="timed repeats")
    parser.add_argument("--output", type=Path, default=PACKAGE_FILE, help="file to write; default: the package's own")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measured time here as well")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, fit, print and write.

    Raises:
        SystemExit: the device is not there.
    """
    options = parse(arguments)
    device, dtype = prepare(options)
    models = options.models or MODELS.get(device.type, MODELS["cpu"])
    torch.manual_seed(0)
    with torch.inference_mode():
        points = measure(models, device, dtype, options.repeats)
    described, found = machine(device), versions()
    facts = {
        "machine": described.get("gpu") or described["cpu"],
        "threads": None if device.type == "cuda" else torch.get_num_threads(),
        "torch": found["torch"],
        "triton": found["triton"],
        "dtype": str(dtype).removeprefix("torch."),
        "models": list(models),
    }
    entries = fit(points, device.type, facts)
    known = PACKAGE_FILE if options.output == PACKAGE_FILE or not options.output.exists() else options.output
    contents = merged(entries, json.loads(known.read_text(encoding="utf-8")))
    options.output.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    if options.json is not None:
        rows = [{"path": p.path, "size": p.size, **p.features, "microseconds": p.microseconds} for p in points]
        options.json.write_text(json.dumps({"measured_on": facts, "times": rows}, indent=2) + "\n", encoding="utf-8")
    console = Console()
    console.print(draw(entries))
    console.print(f"written to {options.output}", highlight=False, soft_wrap=True)
    return contents


if __name__ == "__main__":
    main()
