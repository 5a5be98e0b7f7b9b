"""How well does each way of loading a picture give it back, and how well does it edit?

Pictures are rendered by the embedded model with other seeds and then forgotten, or drawn with shapes, which the model
has never seen. Each is loaded in every way with 25 steps of the model's own scheduler and edited once under a drawn
mask. Giving back is measured on the run that starts at the inversion's noise and gets no corrections (``free``) and
on the corrected one; editing by the embedded CLIP: how much better the edited picture fits the new caption than the
old one, and the same for the picture before.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: make the repository's root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image, ImageDraw
from rich.table import Table

from benchmarks.support.harness import Report, argument_parser, machine, positive, prepare, versions
from fisedit_compiler import Editor, masks
from fisedit_compiler.models import load_clip, load_pipeline
from fisedit_compiler.pipelines import DdimInversion
from fisedit_compiler.pipelines.drawing.pictures import contact_sheet, mask_to_pixels

Box = tuple[float, float, float, float]
LEFT: Box = (0.2, 0.02, 0.85, 0.52)
RIGHT: Box = (0.2, 0.48, 0.85, 0.98)
CENTER: Box = (0.12, 0.12, 0.88, 0.88)
RENDER_STEPS = 12


@dataclass(frozen=True)
class Picture:
    """A picture to load, and one edit of it.

    Attributes:
        name: of its row.
        prompt: what it shows.
        edited: what it shall show.
        box: where: the ellipse in it is the mask.
        seed: of the run that renders it; ``None`` if it is drawn.
    """

    name: str
    prompt: str
    edited: str
    box: Box
    seed: int | None = None


PICTURES = (
    Picture(
        "cat",
        "a cat on the left and a rocket on the right, blue background",
        "a dog on the left and a rocket on the right, blue background",
        LEFT,
        seed=101,
    ),
    Picture("drawn-sun", "a sun in the center, blue background", "a moon in the center, blue background", CENTER),
    Picture(
        "apple",
        "an apple on the left and a banana on the right, green background",
        "an apple on the left and a carrot on the right, green background",
        RIGHT,
        seed=102,
    ),
    Picture("car", "a car in the center, desert", "a golden car in the center, desert", CENTER, seed=103),
    Picture("drawn-apple", "an apple in the center, grass field", "a pumpkin in the center, grass field", CENTER),
    Picture("owl", "an owl in the center, night sky", "a penguin in the center, night sky", CENTER, seed=104),
    Picture(
        "house",
        "a house on the left and a balloon on the right, snow field",
        "a castle on the left and a balloon on the right, snow field",
        LEFT,
        seed=105,
    ),
    Picture(
        "ball",
        "a soccer ball on the left and a teddy bear on the right, wooden floor",
        "a basketball on the left and a teddy bear on the right, wooden floor",
        LEFT,
        seed=106,
    ),
)
METHODS: dict[str, Any] = {
    "ddim": DdimInversion(),
    "edit-friendly": "edit-friendly",
    "ddim-from-clean": DdimInversion(noisy_start=False),
}
"""The last is the textbook's walk, which starts at the picture's own latents."""


def draw(name: str, size: int) -> Image.Image:
    """A picture of plain shapes, ``size`` pixels a side."""
    scale = size / 256
    background, lower = ((60, 110, 220), (60, 110, 220)) if name == "drawn-sun" else ((150, 200, 250), (90, 170, 70))
    picture = Image.new("RGB", (4 * size, 4 * size), background)
    pen = ImageDraw.Draw(picture)

    def box(*edges: float) -> list[float]:
        return [4 * scale * edge for edge in edges]

    pen.rectangle(box(0, 170, 256, 256), fill=lower)
    if name == "drawn-sun":
        for angle in range(0, 360, 30):
            pen.pieslice(box(58, 58, 198, 198), angle - 6, angle + 6, fill=(250, 170, 30))
        pen.ellipse(box(80, 80, 176, 176), fill=(250, 210, 50))
    else:
        pen.ellipse(box(78, 90, 150, 190), fill=(215, 35, 45))
        pen.ellipse(box(106, 90, 178, 190), fill=(215, 35, 45))
        pen.line(box(128, 100, 136, 66), fill=(100, 65, 30), width=round(28 * scale))
        pen.ellipse(box(136, 66, 172, 84), fill=(70, 150, 60))
    # Drawn at four times the size: edges without steps, as pictures have them.
    return picture.resize((size, size), Image.Resampling.LANCZOS)


def measure(
    picture: Picture, methods: Sequence[str], steps: int, guidance: float, folder: Path | None
) -> list[dict[str, Any]]:
    """One row per method; with ``folder``, a sheet of what it made as well."""
    pipe = load_pipeline()
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    if picture.seed is None:
        image = draw(picture.name, size)
    else:
        noise = torch.Generator().manual_seed(picture.seed)
        options = {"num_inference_steps": RENDER_STEPS, "guidance_scale": guidance}
        image = pipe(picture.prompt, generator=noise, **options).images[0]
    clip = load_clip()

    def preference(shown: Image.Image) -> float:
        old, new = clip.similarity([shown], [picture.prompt, picture.edited])[0].tolist()
        return new - old

    rows, cells = [], [(image, picture.prompt)]
    sites = size // pipe.vae_scale_factor
    mask = masks.ellipse_mask(sites, sites, picture.box)
    with Editor(pipe, progress=False) as editor:
        for method in methods:
            loaded = editor.load(
                image,
                picture.prompt,
                inversion=METHODS[method],
                num_inference_steps=steps,
                guidance_scale=guidance,
            )
            edit = editor.edit(loaded, picture.edited, mask=mask, record=False)
            outside = ~mask_to_pixels(edit.mask, image)
            rows.append(
                {
                    "picture": picture.name,
                    "method": method,
                    "free_psnr": loaded.inversion.free_psnr,
                    "corrected_psnr": loaded.inversion.corrected_psnr,
                    "correction": loaded.inversion.correction,
                    "noise_std": float(loaded.initial_latents.std()),
                    "preference_before": preference(image),
                    "preference": preference(edit.image),
                    "outside_is_the_picture": bool(
                        np.array_equal(np.asarray(edit.image)[outside], np.asarray(image)[outside])
                    ),
                }
            )
            cells.append((edit.image, f"{method}: {picture.edited}"))
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        contact_sheet([cells]).save(folder / f"{picture.name}.png")
    return rows


def measured(
    pictures: Sequence[Picture], methods: Sequence[str], options: argparse.Namespace
) -> Iterator[list[dict[str, Any]]]:
    """The rows of each picture as they are known, from ``options.jobs`` processes."""
    work = partial(
        measure, methods=methods, steps=options.steps, guidance=options.guidance, folder=options.pictures_folder
    )
    if options.jobs == 1:
        yield from map(work, pictures)
        return
    context = multiprocessing.get_context("spawn")
    threads = partial(torch.set_num_threads, torch.get_num_threads())
    with ProcessPoolExecutor(options.jobs, mp_context=context, initializer=threads) as pool:
        for future in as_completed([pool.submit(work, picture) for picture in pictures]):
            yield future.result()


def table_of(rows: Sequence[dict[str, Any]], methods: Sequence[str]) -> Table:
    table = Table(title="medians over the pictures; preference: CLIP similarity with the new caption minus the old")
    for column in ("method", "pictures", "free, dB", "corrected, dB", "corrections", "noise std", "before", "edited"):
        table.add_column(column, justify="left" if column == "method" else "right")
    keys = ("free_psnr", "corrected_psnr", "correction", "noise_std", "preference_before", "preference")
    for method in methods:
        own = [row for row in rows if row["method"] == method]
        if own:
            medians = [statistics.median(row[key] for row in own) for key in keys]
            formats = ("{:.1f}", "{:.1f}", "{:.1%}", "{:.2f}", "{:+.3f}", "{:+.3f}")
            shown = [form.format(value) for form, value in zip(formats, medians, strict=True)]
            table.add_row(method, str(len(own)), *shown)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: ``python -m benchmarks.inversion --jobs 2 --json FILE``."""
    parser = argument_parser(__doc__ or "", repeats=1)
    parser.add_argument("--steps", type=positive, default=25)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--pictures", nargs="+", choices=[picture.name for picture in PICTURES])
    parser.add_argument("--jobs", type=positive, default=1, help="pictures measured at a time, a process each")
    parser.add_argument("--pictures-folder", type=Path, metavar="FOLDER", help="write a sheet per picture here")
    options = parser.parse_args(arguments)
    device, _ = prepare(options)
    pictures = [picture for picture in PICTURES if not options.pictures or picture.name in options.pictures]
    settings = {key: getattr(options, key) for key in ("steps", "guidance", "methods", "jobs")} | {
        "pictures": [picture.name for picture in pictures],
        "render_steps": RENDER_STEPS,
    }
    rows: list[dict[str, Any]] = []
    report = Report("inversion", settings, machine(device), versions(), rows)
    for found in measured(pictures, options.methods, options):
        rows += found
        order = {picture.name: number for number, picture in enumerate(pictures)}
        rows.sort(key=lambda row: (order[row["picture"]], options.methods.index(row["method"])))
        if options.json is not None:
            report.write(options.json)
    report.publish(table_of(rows, options.methods), options.json)


if __name__ == "__main__":
    main()
