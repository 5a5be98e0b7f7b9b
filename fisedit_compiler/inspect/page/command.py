"""What the command ``fisedit inspect`` does: load a UNet, compile it, write the page or the drawing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fisedit_compiler import masks
from fisedit_compiler.config import SparsifyConfig
from fisedit_compiler.errors import FiseditError
from fisedit_compiler.inputs import known_model
from fisedit_compiler.inspect.page.build import build_page
from fisedit_compiler.inspect.page.drawing import draw_program
from fisedit_compiler.inspect.page.timeline import Event, profile_call
from fisedit_compiler.runtime.module import SparseModule

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
    from fisedit_compiler.api import sparsify
    from fisedit_compiler.models import load_pipeline

    for path in (html, svg):
        if path is not None:
            _check_writable(path)
    unet = load_pipeline(model).unet.eval()
    side = int(unet.config["sample_size"])
    sites = square(side) if mask is None else masks.to_site_mask(mask, side, side)
    compiled = sparsify(unet, SparsifyConfig(dense_above=1.0))
    written = []
    if html is not None:
        events = profile_edit(compiled, sites) if profile else None
        title = f"{'emoji-scenes' if model is None else model.name}: {type(unet).__name__}"
        html.write_text(build_page(compiled, sites, title=title, events=events), encoding="utf-8")
        written.append(html)
    if svg is not None:
        svg.write_text(draw_program(compiled.programs[0]), encoding="utf-8")
        written.append(svg)
    return written


def square(side: int) -> Tensor:
    """A square of :data:`DEFAULT_AREA` in the middle of ``side`` by ``side`` sites."""
    mask = torch.zeros(side, side, dtype=torch.bool)
    width = max(round(side * DEFAULT_AREA**0.5), 1)
    start = (side - width) // 2
    mask[start : start + width, start : start + width] = True
    return mask


@torch.no_grad()
def profile_edit(compiled: SparseModule, mask: Tensor) -> list[Event]:
    """The operations of a second sparse call, its inputs random: the first one computes what depends on the prompt.

    Raises:
        FiseditError: the model's class is unknown, so nobody knows what to call it with.
    """
    base = _example(compiled.original, mask, seed=0)
    edit = _example(compiled.original, mask, seed=1)
    edit["sample"] = torch.where(mask.to(base["sample"].device), edit["sample"], base["sample"])
    with compiled.record() as recording:
        for _ in range(2):
            compiled(**base)
    with compiled.edit(recording, mask):
        compiled(**edit)
        return profile_call(lambda: compiled(**edit), base["sample"].device)


def _example(module: nn.Module, mask: Tensor, seed: int) -> dict[str, Any]:
    known = known_model(module)
    if known is None:
        raise FiseditError(
            f"{type(module).__name__} is no known model class, so no call of it can be made up; profile an edit of "
            "your own with fisedit_compiler.inspect.page.timeline.profile_call and pass it as events=."
        )
    generator = torch.Generator().manual_seed(seed)

    def random(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: random(item) for name, item in value.items()}
        return torch.randn(value.shape, generator=generator).to(value) if value.dim() else value

    example = known.example(module)
    height, width = mask.shape
    example["sample"] = example["sample"].new_zeros(*example["sample"].shape[:2], height, width)
    return {name: random(value) for name, value in example.items()}


def _check_writable(path: Path) -> None:
    """Fail before the work, not after it."""
    if path.is_dir() or not path.parent.is_dir():
        raise FiseditError(f"cannot write to {str(path)!r}; name a file in a folder that exists")
