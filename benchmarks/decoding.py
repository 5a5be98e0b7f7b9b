"""What does a sparse decode cost, from which area on is a dense one faster, and how large is the step at its border?

The decoder of a VAE decodes latents that a mask's sites changed: densely, as a pipeline does, and inside the mask with
a border of several widths, entered anew for each picture, in turn. Beside the times stands what the widths do to the
picture: the step over the border, where the edit's pixels meet the base's, in levels of 255, and the distance of the
pixels inside the mask to the dense decode of the same latents. ``--model sd`` is Stable Diffusion's decoder with random
weights; the embedded one was trained.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: make the repository's root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.step_latency import area
from benchmarks.support.harness import (
    Report,
    Stopwatch,
    alternate,
    argument_parser,
    machine,
    positive,
    prepare,
    versions,
)
from benchmarks.support.subjects import square_mask

FRACTIONS = (0.02, 0.05, 0.15, 0.30, 0.60)


def load_vae(model: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The embedded model's VAE, or one of Stable Diffusion's architecture with random weights."""
    if model == "embedded":
        from fisedit_compiler.models import load_pipeline

        return load_pipeline(device=device, dtype=dtype).vae
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=down, up_block_types=up, layers_per_block=2,
        latent_channels=4,
    )  # fmt: skip
    return vae.eval().to(device, dtype)


def smooth_latents(size: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Latents ``[1, 4, size, size]`` with patches of four sites, as large as those of pictures."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(1, 4, -(-size // 4), -(-size // 4), generator=generator)
    whole = patches.repeat_interleave(4, 2).repeat_interleave(4, 3)
    return whole[..., :size, :size].contiguous().to(device, dtype)


def rim(inside: Tensor) -> Tensor:
    """The pixels of a bool mask ``[H, W]`` that touch one outside it."""
    return inside & (torch.nn.functional.max_pool2d((~inside)[None].float(), 3, 1, 1)[0] > 0)


def measure(
    compiled: Any, base: Tensor, new: Tensor, fraction: float, borders: list[int], *, repeats: int, warmup: int
) -> list[dict[str, Any]]:
    """The rows of one mask area: every border, and the dense decode beside it."""
    from fisedit_compiler.masks import grown
    from fisedit_compiler.pipelines.decoding.decoder import as_pixels

    mask = square_mask(fraction, *base.shape[-2:])
    latents = torch.where(mask.to(base.device), new, base)
    dense = compiled.original(latents)
    with compiled.record() as recording:
        pixels = compiled(base)
    scale = pixels.shape[-1] // base.shape[-1]
    grown_masks = {border: grown(mask, border) for border in borders}

    def sparse(border: int) -> Tensor:
        with compiled.edit(recording, grown_masks[border]):
            decoded: Tensor = compiled(latents)
        return decoded

    def timed(border: int) -> Any:
        return lambda stopwatch: stopwatch.time(str(border), lambda: sparse(border))

    def densely(stopwatch: Stopwatch) -> None:
        stopwatch.time("dense", lambda: compiled.original(latents))

    sides = [densely, *(timed(border) for border in borders)]
    stopwatch = alternate(sides, repeats=repeats, warmup=warmup, device=base.device)
    rows = []
    for border, sites in grown_masks.items():
        decoded = sparse(border)
        edge = rim(as_pixels(sites, scale))
        inside = as_pixels(mask, scale)
        step = 127.5 * (decoded - pixels)[..., edge].float().abs()
        error = (decoded - dense)[..., inside].float().square().mean()
        rows.append(
            {
                "mask_fraction": round(mask.float().mean().item(), 4),
                "border": border,
                "area": round(sites.float().mean().item(), 4),
                **stopwatch["dense"].as_dict("dense"),
                **stopwatch[str(border)].as_dict("sparse"),
                "ratio": round(stopwatch["dense"].median_ms / stopwatch[str(border)].median_ms, 3),
                "step_mean": round(step.mean().item(), 3) if step.numel() else 0.0,
                "step_max": round(step.max().item(), 2) if step.numel() else 0.0,
                "inside_psnr": round((10 * torch.log10(4 / error.clamp_min(1e-12))).item(), 2),
                "recording_mib": round(recording.nbytes / 2**20, 1),
            }
        )
    return rows


def draw(rows: list[dict[str, Any]], title: str) -> Table:
    """The rows as a table for people."""
    table = Table(title=title, caption="median ± interquartile range; steps in levels of 255")
    for column in ("mask", "border", "area", "dense ms", "sparse ms", "ratio", "step mean", "max", "dB inside"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            f"{row['mask_fraction']:.1%}",
            str(row["border"]),
            f"{row['area']:.1%}",
            f"{row['dense_ms']:.1f} ± {row['dense_iqr_ms']:.1f}",
            f"{row['sparse_ms']:.1f} ± {row['sparse_iqr_ms']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['step_mean']:.2f}",
            f"{row['step_max']:.1f}",
            f"{row['inside_psnr']:.1f}",
        )
    return table


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    from fisedit_compiler.pipelines.decoding.decoder import BORDER

    parser = argument_parser(str(__doc__).splitlines()[0], repeats=7)
    parser.add_argument("--model", choices=("embedded", "sd"), default="embedded", help="whose decoder")
    parser.add_argument("--size", type=positive, default=64, help="height and width of the latents")
    parser.add_argument("--fractions", type=area, nargs="+", metavar="F", default=list(FRACTIONS), help="mask areas")
    parser.add_argument("--borders", type=int, nargs="+", metavar="N", default=[BORDER], help="sites around the mask")
    parser.add_argument("--norm", choices=("recorded", "incremental"), default="recorded", help="statistics")
    parser.add_argument("--warmup", type=positive, default=1, help="untimed repeats before the timed ones")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> Report:
    """Run the benchmark, print and write its report."""
    options = parse(arguments)
    device, dtype = prepare(options)
    from fisedit_compiler import SparsifyConfig, sparsify
    from fisedit_compiler.pipelines.decoding.decoder import Decoding

    facts = machine(device)
    vae = load_vae(options.model, device, dtype)
    base, new = (smooth_latents(options.size, seed, device, dtype) for seed in (1, 2))
    config = SparsifyConfig(norm=options.norm, multiple=1, dense_above=1.0, check_inputs=False)
    with torch.no_grad():
        compiled = sparsify(Decoding(vae), config, example_inputs={"latents": base})
        rows = [
            row
            for fraction in options.fractions
            for row in measure(
                compiled, base, new, fraction, options.borders, repeats=options.repeats, warmup=options.warmup
            )
        ]
    settings = {
        "model": options.model,
        "latents": list(base.shape),
        "dtype": str(dtype).removeprefix("torch."),
        "norm": options.norm,
        "fractions": options.fractions,
        "borders": options.borders,
        "repeats": options.repeats,
        "warmup": options.warmup,
    }
    report = Report("decoding", settings, facts, versions(), rows)
    report.publish(draw(rows, f"decoder of {options.model}, latents {settings['latents']}"), options.json)
    return report


if __name__ == "__main__":
    main()
