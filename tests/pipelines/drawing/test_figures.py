"""Outlines lie where the masks' borders are, heat maps show their threshold, and notebooks display it all."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.contour import ContourSet
from PIL import Image

from fisedit_compiler import masks
from fisedit_compiler.errors import MaskError
from fisedit_compiler.pipelines import Editor, Generation, LatentDifference
from fisedit_compiler.pipelines.drawing.figures import mask_contours

IMAGE = Image.new("RGB", (64, 32), (200, 100, 50))
CENTRE = masks.box_mask(8, 16, (0.25, 0.25, 0.75, 0.5))


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    """matplotlib only warns of contours that are nowhere; here that is a mistake."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def contours(axes: Axes) -> list[ContourSet]:
    return [child for child in axes.get_children() if isinstance(child, ContourSet)]


def extent(contour: ContourSet) -> tuple[float, float, float, float]:
    """First and last x, first and last y."""
    points = torch.tensor(contour.get_paths()[0].vertices)
    (left, top), (right, bottom) = points.amin(0).tolist(), points.amax(0).tolist()
    return left, right, top, bottom


def test_an_outline_runs_between_the_pixels_of_the_masks_border() -> None:
    (axes,) = mask_contours(IMAGE, CENTRE).axes
    (contour,) = contours(axes)
    # Pixels 16 to 31 across and 8 to 23 down are active; pixel centres are whole numbers.
    assert extent(contour) == (15.5, 31.5, 7.5, 23.5)
    assert axes.get_legend() is None


def test_a_full_mask_is_outlined_at_the_pictures_edge() -> None:
    (axes,) = mask_contours(IMAGE, torch.ones(8, 16, dtype=torch.bool)).axes
    assert extent(contours(axes)[0]) == (-0.5, 63.5, -0.5, 31.5)
    assert axes.get_xlim() == (-1, 64)


@pytest.mark.parametrize("named", [True, False])
def test_several_masks_have_colours_and_a_legend(named: bool) -> None:
    three = {"cat": CENTRE, "sky": ~CENTRE, "nothing": torch.zeros_like(CENTRE)}
    (axes,) = mask_contours(IMAGE, three if named else list(three.values())).axes
    assert len(contours(axes)) == 2
    colours = {tuple(contour.get_edgecolor()[0]) for contour in contours(axes)}
    assert len(colours) == 2
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    names = list(three) if named else ["mask 1", "mask 2", "mask 3"]
    assert texts == [f"{names[0]}, 12.5%", f"{names[1]}, 87.5%", f"{names[2]}, 0.0%"]


def test_a_heat_map_shows_its_threshold() -> None:
    heat = torch.linspace(0.0, 4.0, 16).expand(8, 16)
    picture, panel, bar = mask_contours(IMAGE, CENTRE, heat, threshold=2.0).axes
    assert len(contours(picture)) == 1
    line, outline = contours(panel)
    assert extent(line)[:2] == pytest.approx((31.5, 31.5))  # the middle of the picture
    assert extent(outline) == (15.5, 31.5, 7.5, 23.5)
    assert panel.get_title() == "heat, threshold 2 (dashed)"
    assert bar.get_lines()[-1].get_ydata() == [2.0, 2.0]


@pytest.mark.parametrize(("heat", "threshold"), [(torch.zeros(8, 16), None), (torch.zeros(8, 16), 1.0)])
def test_a_flat_heat_map_has_no_threshold_line(heat: torch.Tensor, threshold: float | None) -> None:
    figure = mask_contours(IMAGE, torch.zeros_like(CENTRE), heat, threshold=threshold)
    assert contours(figure.axes[1]) == []
    figure.savefig(io.BytesIO())


def test_notebooks_get_a_png() -> None:
    figure = mask_contours(IMAGE, CENTRE)
    with Image.open(io.BytesIO(figure._repr_png_())) as shown:
        assert shown.format == "PNG"
        assert shown.size == tuple(figure.get_size_inches() * figure.dpi)


def test_what_is_no_mask_is_named() -> None:
    with pytest.raises(MaskError, match="to_site_mask"):
        mask_contours(IMAGE, CENTRE.float())
    with pytest.raises(MaskError, match="mask 2"):
        mask_contours(IMAGE, [CENTRE, CENTRE[None]])
    with pytest.raises(MaskError, match="no mask"):
        mask_contours(IMAGE, [])


@pytest.mark.parametrize("found", [True, False])
def test_an_edit_shows_base_heat_and_edit(
    found: bool, pinned_editor: Editor, generate: Callable[..., Generation], tmp_path: Path
) -> None:
    drawn = masks.box_mask(16, 16, (0.0, 0.0, 0.5, 1.0))
    mask = LatentDifference(everywhere_ratio=1.0) if found else drawn
    edit = pinned_editor.edit(generate(num_inference_steps=3), "a dog", mask=mask, dense_calls=1, record=False)
    figure = edit.show()
    pictures = [axes for axes in figure.axes if axes.get_images()]
    # Of the panels the base and the heat map carry the mask's outline, and the heat map its threshold.
    assert [len(contours(axes)) for axes in pictures] == ([1, 2, 0] if found else [1, 0])
    assert pictures[0].get_title().replace("\n", " ") == f"a cat (outline: mask, {edit.report.area:.1%} of the sites)"
    assert pictures[-1].get_title() == "a dog"
    figure.savefig(tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as saved, Image.open(io.BytesIO(edit._repr_png_())) as shown:
        assert saved.size == shown.size
        assert shown.format == "PNG"
