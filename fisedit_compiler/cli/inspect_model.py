"""What the command ``fisedit inspect`` does: load a UNet, compile it, write the page or the drawing."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fisedit_compiler import masks
from fisedit_compiler.api import sparsify
from fisedit_compiler.config import SparsifyConfig
from fisedit_compiler.errors import FiseditError
from fisedit_compiler.inspect.page.build import build_page
from fisedit_compiler.inspect.page.drawing import draw_program
from fisedit_compiler.inspect.page.profile import profile_edit

DEFAULT_AREA = 0.06
"""Share of the sites in the mask that is used when none is given."""


def inspect_model(
    model: Path | None, mask: Path | None, *, html: Path | None = None, svg: Path | None = None, profile: bool = False
) -> list[Path]:
    """Compile a pipeline's UNet and write what was asked for.

    Args:
        model: directory in diffusers layout; the embedded model if ``None``.
        mask: image file of the mask; a square of :data:`DEFAULT_AREA` of the sites if ``None``.
        html: where the page goes.
        svg: where the drawing alone goes.
        profile: run one sparse call of random inputs and draw where its time goes.

    Returns:
        The files written.

    Raises:
        ModelNotFoundError: the directory holds no pipeline.
        MaskError: the mask cannot be read or has a size that the model's latents do not have.
        FiseditError: a file cannot be written.
    """
    from fisedit_compiler.models import load_pipeline

    for path in (html, svg):
        if path is not None:
            _check_writable(path)
    unet = load_pipeline(model).unet.eval()
    side = unet.config["sample_size"]
    if not isinstance(side, int) or side < 1:
        raise FiseditError(
            f"the config of the UNet says that its latents are {side!r} wide; only squares are drawn here"
        )
    sites = square(side) if mask is None else masks.to_site_mask(mask, side, side)
    compiled = sparsify(unet, SparsifyConfig(dense_above=1.0))
    written = []
    if html is not None:
        events = profile_edit(compiled, sites) if profile else None
        title = f"{'emoji-scenes' if model is None else model.name}: {type(unet).__name__}"
        html.write_text(
            build_page(compiled, sites, title=title, events=events), encoding="utf-8", errors="backslashreplace"
        )
        written.append(html)
    if svg is not None:
        svg.write_text(draw_program(compiled.programs[0]), encoding="utf-8", errors="backslashreplace")
        written.append(svg)
    return written


def square(side: int) -> Tensor:
    """A square of :data:`DEFAULT_AREA` in the middle of ``side`` by ``side`` sites."""
    mask = torch.zeros(side, side, dtype=torch.bool)
    width = max(round(side * DEFAULT_AREA**0.5), 1)
    start = (side - width) // 2
    mask[start : start + width, start : start + width] = True
    return mask


def _check_writable(path: Path) -> None:
    """Fail before the work, not after it."""
    if path.is_dir() or not path.parent.is_dir():
        raise FiseditError(f"cannot write to {str(path)!r}; name a file in a folder that exists")
