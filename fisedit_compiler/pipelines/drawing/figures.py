"""Plots of edits by matplotlib: outlines of masks over an image, a heat map with its threshold, an edit as a whole.

The figures are made without pyplot, so they need no display and nobody has to close them. They know their own PNG,
so a notebook shows them as the result of a cell whatever its backend; ``figure.savefig(path)`` works everywhere.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from PIL import Image

from fisedit_compiler.errors import MaskError
from fisedit_compiler.pipelines.drawing.pictures import mask_to_pixels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FIRST_COLOUR = "#ff4040"
_PANEL = 3.3
_TITLE = 3.9
_THRESHOLD_COLOUR = "white"


class NotebookFigure(Figure):
    """A figure that Jupyter displays without pyplot and without a matplotlib backend for notebooks."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def mask_contours(
    image: Image.Image,
    mask: torch.Tensor | Sequence[torch.Tensor] | Mapping[str, torch.Tensor],
    heat: torch.Tensor | None = None,
    *,
    threshold: float | None = None,
) -> NotebookFigure:
    """The outlines of one or several masks over an image, and beside it the heat map a mask was found in.

    Args:
        image: the picture, of any size.
        mask: bool ``[H, W]``; or several, as a sequence or by name, each in a colour of its own, with a legend.
        heat: a map ``[H, W]`` of floats, drawn over the image in a second panel.
        threshold: the value of ``heat`` that was the limit; drawn as a dashed line.

    Raises:
        MaskError: a mask is no bool tensor ``[H, W]``, or there is none.
    """
    named = _named(mask)
    panels = 1 if heat is None else 2
    figure = NotebookFigure(figsize=(_PANEL * panels, _TITLE), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    _picture(axes[0], image)
    _outline_all(axes[0], image, named)
    if heat is not None:
        _heat(axes[1], image, heat, threshold)
        _outline_all(axes[1], image, named, legend=False)
    return figure


def edit_figure(
    before: tuple[Image.Image, str],
    after: tuple[Image.Image, str],
    mask: torch.Tensor,
    *,
    area: float,
    heat: torch.Tensor | None = None,
    threshold: float | None = None,
) -> NotebookFigure:
    """The base with the mask's outline, the heat map if the mask was found in one, and the edit, side by side.

    Args:
        before: the base's picture and prompt.
        after: the edit's.
        mask: bool ``[H, W]``.
        area: the share of its sites that is active.
        heat: as for :func:`mask_contours`.
        threshold: likewise.
    """
    panels = 2 if heat is None else 3
    figure = NotebookFigure(figsize=(_PANEL * panels, _TITLE), layout="constrained")
    axes = figure.subplots(1, panels)
    image, prompt = before
    _picture(axes[0], image, f"{prompt} (outline: mask, {area:.1%} of the sites)")
    _outline_all(axes[0], image, {"mask": mask})
    if heat is not None:
        _heat(axes[1], image, heat, threshold)
        _outline_all(axes[1], image, {"mask": mask})
    _picture(axes[-1], *after)
    return figure


def _named(mask: torch.Tensor | Sequence[torch.Tensor] | Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    if isinstance(mask, torch.Tensor):
        named: Mapping[str, Any] = {"mask": mask}
    elif isinstance(mask, Mapping):
        named = mask
    else:
        named = {f"mask {number}": one for number, one in enumerate(mask, start=1)}
    if not named:
        raise MaskError("there is no mask to draw; pass one or more")
    for name, one in named.items():
        if not isinstance(one, torch.Tensor) or one.dtype != torch.bool or one.ndim != 2:
            raise MaskError(f"{name} is no bool tensor [H, W]; convert it by fisedit_compiler.masks.to_site_mask")
    return named


def _picture(axes: Axes, image: Image.Image, title: str = "") -> None:
    axes.imshow(np.asarray(image.convert("RGB")))
    axes.set_title(textwrap.fill(title, 42), fontsize=9)
    axes.set_axis_off()


def _outline_all(axes: Axes, image: Image.Image, named: Mapping[str, torch.Tensor], *, legend: bool = True) -> None:
    colours = [_FIRST_COLOUR, *(colour for i, colour in enumerate(colormaps["tab10"].colors) if i != 3)]  # type: ignore[attr-defined]
    lines = []
    for number, (name, mask) in enumerate(named.items()):
        colour = colours[number % len(colours)]
        if bool(mask.any()):  # matplotlib warns of a contour that is nowhere
            _outline(axes, mask_to_pixels(mask, image), colour)
        lines.append(Line2D([], [], color=colour, label=f"{name}, {mask.float().mean():.1%}"))
    if legend and len(named) > 1:
        axes.legend(handles=lines, fontsize=8, loc="upper right")


def _outline(axes: Axes, active: np.ndarray[Any, Any], colour: Any) -> None:
    """A line between the active pixels and the others, at the picture's edge too."""
    height, width = active.shape
    # One row and column around the picture close the line where the mask reaches its edge.
    x, y = np.arange(-1, width + 1), np.arange(-1, height + 1)
    lines = axes.contour(x, y, np.pad(active, 1).astype(float), levels=[0.5], colors=[colour], linewidths=1.5)
    # Whatever the picture's colour, the line stands out against its own rim.
    lines.set_path_effects([withStroke(linewidth=3.0, foreground="white")])
    axes.set(xlim=(-1, width), ylim=(height, -1))


def _heat(axes: Axes, image: Image.Image, heat: torch.Tensor, threshold: float | None) -> None:
    values = heat.detach().float().cpu().numpy()
    axes.imshow(np.asarray(image.convert("L")), cmap="gray", vmin=0, vmax=255)
    edges = (-0.5, image.width - 0.5, image.height - 0.5, -0.5)
    drawn = axes.imshow(values, extent=edges, alpha=0.7, cmap="inferno", interpolation="nearest")
    title = "heat"
    bar = axes.figure.colorbar(drawn, ax=axes, shrink=0.75)
    if threshold is not None:
        title = f"heat, threshold {threshold:.3g} (dashed)"
        bar.ax.axhline(threshold, color=_THRESHOLD_COLOUR, linestyle="--")
        if min(values.shape) > 1 and values.min() < threshold < values.max():
            rows, columns = values.shape
            x = (np.arange(columns) + 0.5) * image.width / columns - 0.5
            y = (np.arange(rows) + 0.5) * image.height / rows - 0.5
            axes.contour(x, y, values, levels=[threshold], colors=[_THRESHOLD_COLOUR], linestyles="--", linewidths=1.0)
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()
