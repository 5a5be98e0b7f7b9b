"""The story ``fisedit demo`` tells: one base, three kinds of edit, each next to its dense run.

It uses the Editor as any user would and returns pictures and numbers; loading a model and printing is the
command line's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fisedit_compiler import masks
from fisedit_compiler.pipelines.drawing.pictures import contact_sheet, mask_overlay, mask_to_pixels
from fisedit_compiler.pipelines.editing.runs import DenseRun, Edit
from fisedit_compiler.pipelines.editor import Editor
from fisedit_compiler.pipelines.likeness import psnr

BASE_PROMPT = "a cat on the left and a rocket on the right, blue background"
COLUMNS = ("base", "mask", "sparse edit", "dense edit (same prompt and seed)")

_PAIR = "a {} on the left and a {} on the right, blue background"
_LEFT_HALF = (0.2, 0.02, 0.85, 0.54)


@dataclass(frozen=True)
class Comparison:
    """An edit next to the dense run of its prompt and seed.

    Attributes:
        title: what kind of edit it is.
        name: the same, as part of a file name.
        edit: the sparse edit.
        dense: the unmodified UNet's run.
    """

    title: str
    name: str
    edit: Edit = field(repr=False)
    dense: DenseRun = field(repr=False)

    @property
    def speedup(self) -> float | None:
        """Dense over sparse time of a UNet call (medians)."""
        sparse = self.edit.report.sparse_ms
        return self.dense.ms / sparse if sparse else None

    @property
    def psnr_to_dense_inside(self) -> float:
        """PSNR in dB between the decoded edit and the dense run, over the pixels inside the mask."""
        return psnr(self.edit.image, self.dense.image, mask_to_pixels(self.edit.mask, self.edit.image))

    @property
    def psnr_to_base_outside(self) -> float:
        """PSNR in dB between the decoded edit and its base, over the pixels outside the mask."""
        outside = ~mask_to_pixels(self.edit.mask, self.edit.image)
        return psnr(self.edit.image, self.edit.base.image, outside)


def run_demo(editor: Editor, *, seed: int, steps: int, guidance: float = 5.0) -> list[Comparison]:
    """Make the base, an edit with a drawn mask, one with the automatic mask, and an edit of the latter.

    Args:
        editor: of a pipeline that knows the words of :data:`BASE_PROMPT`.
        seed: of the noise.
        steps: of the scheduler.
        guidance: weight of guidance; 0 for a model that needs none.
    """
    base = editor.generate(BASE_PROMPT, seed=seed, num_inference_steps=steps, guidance_scale=guidance)
    height, width = base.latents[0].shape[-2:]
    drawn = editor.edit(
        base,
        _PAIR.format("dog", "rocket"),
        mask=masks.ellipse_mask(height, width, _LEFT_HALF),
        record=False,
    )
    automatic = editor.edit(base, _PAIR.format("cat", "planet"))
    second = editor.edit(automatic, _PAIR.format("panda", "planet"), record=False)
    edits = (
        ("drawn mask", "drawn-mask", drawn),
        ("automatic mask", "automatic-mask", automatic),
        ("edit of that edit", "edit-of-an-edit", second),
    )
    return [Comparison(title, name, edit, editor.dense(base, edit.prompt)) for title, name, edit in edits]


def save_pictures(comparisons: Sequence[Comparison], folder: Path) -> list[Path]:
    """Write every picture and one sheet of all of them as PNG; returns the paths, the sheet's last."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"base": comparisons[0].edit.base.image}
    rows = []
    for number, comparison in enumerate(comparisons, start=1):
        edit = comparison.edit
        overlay = mask_overlay(edit.base.image, edit.mask)
        stem = f"{number}-{comparison.name}"
        pictures |= {stem: edit.image, f"{stem}-mask": overlay, f"{stem}-dense": comparison.dense.image}
        rows.append(
            [
                (edit.base.image, edit.base.prompt),
                (overlay, f"{comparison.title}: {edit.report.area:.1%} of the sites"),
                (edit.image, edit.prompt),
                (comparison.dense.image, edit.prompt),
            ]
        )
    pictures["sheet"] = contact_sheet(rows, columns=COLUMNS)
    paths = []
    for name, picture in pictures.items():
        paths.append(folder / f"{name}.png")
        picture.save(paths[-1])
    return paths
