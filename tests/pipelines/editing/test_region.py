"""Boxes and polygons of an edit: alone they are the mask, with another one they cut it, and may contradict it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fisedit_compiler import masks
from fisedit_compiler.errors import MaskError
from fisedit_compiler.pipelines import DetectedMask, Editor, Generation, LatentDifference
from fisedit_compiler.pipelines.editing.region import cut, cut_found

STEPS = 3
LEFT, RIGHT, TOP = (0.0, 0.0, 1.0, 0.25), (0.0, 0.5, 1.0, 1.0), (0.0, 0.0, 0.5, 1.0)
TRIANGLE = [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0)]
Generate = Callable[..., Generation]


def box(*boxes: masks.Box) -> torch.Tensor:
    return masks.regions_mask(16, 16, boxes)


@pytest.fixture
def base(generate: Generate) -> Generation:
    return generate(num_inference_steps=STEPS)


@pytest.fixture
def masked(pinned_editor: Editor, base: Generation) -> Callable[..., torch.Tensor]:
    """The mask that an edit with these arguments uses; the edit keeps its promise."""

    def run(**arguments: Any) -> torch.Tensor:
        edit = pinned_editor.edit(base, "a dog", record=False, **arguments)
        assert edit.unchanged_outside
        assert edit.report.mask_source == "user"
        return edit.mask

    return run


def test_alone_they_are_the_mask(masked: Callable[..., torch.Tensor]) -> None:
    triangle = masks.polygon_mask(16, 16, TRIANGLE)
    assert torch.equal(masked(box=LEFT), box(LEFT))
    assert torch.equal(masked(box=[LEFT, RIGHT]), box(LEFT, RIGHT))
    assert torch.equal(masked(box=np.array([LEFT, RIGHT])), box(LEFT, RIGHT))
    assert torch.equal(masked(polygon=TRIANGLE), triangle)
    assert torch.equal(masked(polygon=np.array(TRIANGLE)), triangle)
    assert torch.equal(masked(polygon=zip((0.0, 1.0, 1.0), (0.0, 0.0, 1.0), strict=True)), triangle)
    assert torch.equal(
        masked(polygon=[TRIANGLE, [(0.0, 0.5), (0.0, 1.0), (0.5, 1.0)]], box=RIGHT), triangle | box(RIGHT)
    )


def test_a_drawn_mask_counts_inside_them_only(masked: Callable[..., torch.Tensor]) -> None:
    assert torch.equal(masked(mask=box(TOP), box=LEFT), box(LEFT) & box(TOP))
    pixels = box(TOP).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(
        masked(mask=pixels, box=LEFT, polygon=TRIANGLE), (box(LEFT) | masks.polygon_mask(16, 16, TRIANGLE)) & box(TOP)
    )


def test_a_mask_beside_its_box_is_a_contradiction(pinned_editor: Editor, base: Generation) -> None:
    pinned_editor.pipe.unet.original = None  # nothing may run
    with pytest.raises(MaskError) as raised:
        pinned_editor.edit(base, "a dog", mask=box(LEFT), box=RIGHT)
    assert str(raised.value) == (
        "contradictory mask and box or polygon: the mask lies outside the box. The mask's sites lie within "
        "(0, 0, 1, 0.25), the region of box= and polygon= within (0, 0.5, 1, 1), as (top, left, bottom, right) of the "
        "picture; move one of them so that they overlap, or leave one out"
    )
    with pytest.raises(MaskError, match="within nothing"):
        pinned_editor.edit(base, "a dog", mask=box(LEFT), box=(0.5, 0.5, 0.5, 0.5))


def test_what_holds_no_site_is_an_empty_mask(pinned_editor: Editor, base: Generation) -> None:
    pinned_editor.pipe.unet.original = None
    for arguments in ({"box": (0.5, 0.5, 0.5, 0.5)}, {"mask": torch.zeros(16, 16, dtype=torch.bool), "box": LEFT}):
        edit = pinned_editor.edit(base, "a dog", **arguments)
        assert edit.image is base.image
        assert "empty" in edit.report.note


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"box": (0, 0, 16, 32)}, r"^box: .*\(0 / height, 0 / width, 16 / height, 32 / width\).*32 pixels high and 32"),
        ({"box": [LEFT, (0.5, 0.0, 0.2, 1.0)]}, r"^box 1: box \(0\.5, 0\.0, 0\.2, 1\.0\)"),
        ({"box": []}, "box= is empty"),
        ({"box": 0.5}, "^box: a box is"),
        ({"box": "left"}, "^box: a box is.*'left'"),
        ({"box": [LEFT, None]}, "^box 1: a box is"),
        ({"polygon": TRIANGLE[:2]}, "^polygon: .*three or more"),
        ({"polygon": [TRIANGLE, TRIANGLE[:1]]}, "^polygon 1: .*three or more"),
        ({"polygon": [(0, 0), (0, 32), (32, 0)]}, r"^polygon: .*\(0 / height, 32 / width\).*32 pixels high"),
        ({"polygon": []}, "polygon= is empty"),
        ({"polygon": 3}, "^polygon: "),
        ({"polygon": [TRIANGLE, None]}, "^polygon 1: "),
        ({"polygon": TRIANGLE, "box": (0.0, 0.0, 2.0, 1.0)}, "^box: "),
    ],
)
@pytest.mark.parametrize("mask", [None, "latent-difference"])
def test_mistakes_are_named_before_anything_runs(
    mask: str | None, arguments: dict[str, Any], message: str, pinned_editor: Editor, base: Generation
) -> None:
    pinned_editor.pipe.unet.original = None
    with pytest.raises(MaskError, match=message):
        pinned_editor.edit(base, "a dog", mask=mask, dense_calls=1, **arguments)


def test_a_found_mask_is_cut(pinned_editor: Editor, base: Generation) -> None:
    rule = LatentDifference(everywhere_ratio=1.0)
    free = pinned_editor.edit(base, "a dog", mask=rule, dense_calls=2, record=False)
    half = next(half for half in (LEFT, RIGHT, TOP) if (free.mask & box(half)).any() and (free.mask & ~box(half)).any())
    edit = pinned_editor.edit(base, "a dog", mask=rule, box=half, dense_calls=2)
    assert torch.equal(edit.mask, free.mask & box(half))
    assert torch.equal(edit.heat, free.heat)
    assert edit.report.mask_source == "latent-difference"
    assert edit.unchanged_outside
    assert pinned_editor.edit(edit, "a fox", mask=box(TOP)).unchanged_outside


def test_a_change_of_the_whole_picture_is_kept_to_the_box(pinned_editor: Editor, base: Generation) -> None:
    rule = LatentDifference(everywhere_ratio=0.0)
    edit = pinned_editor.edit(base, "a dog", mask=rule, box=LEFT, dense_calls=1)
    assert torch.equal(edit.mask, box(LEFT))
    assert edit.report.dense_calls == 1 and edit.report.sparse_calls == STEPS - 1
    assert edit.report.note == ""
    assert edit.unchanged_outside
    whole = pinned_editor.edit(base, "a dog", mask=rule, box=(0.0, 0.0, 1.0, 1.0), dense_calls=1)
    assert "whole picture" in whole.report.note


def test_a_change_beside_the_box_is_the_base_and_says_so(pinned_editor: Editor, base: Generation) -> None:
    rule = LatentDifference(everywhere_ratio=1.0)
    found = pinned_editor.edit(base, "a dog", mask=rule, dense_calls=1, record=False).mask
    row, column = (~found).nonzero()[0].tolist()
    beside = (row / 16, column / 16, (row + 1) / 16, (column + 1) / 16)
    edit = pinned_editor.edit(base, "a dog", mask=rule, box=beside, dense_calls=1)
    assert edit.image is base.image
    assert edit.unchanged_outside and not edit.mask.any()
    assert edit.report.note == "nothing of the change that was found lies inside the box or polygon"
    assert edit.report.dense_calls == 1 and edit.report.sparse_calls == 0


def test_cutting() -> None:
    found = DetectedMask(torch.ones(16, 16, dtype=torch.bool), 0.5, torch.ones(16, 16), everywhere=True)
    assert cut_found(found, None) is found
    assert cut_found(found, torch.ones_like(found.mask)).everywhere
    assert torch.equal(cut_found(found, box(LEFT)).mask, box(LEFT))
    assert not cut_found(found, box(LEFT)).everywhere
    assert cut(box(LEFT), None) is not None
    assert torch.equal(cut(box(TOP), box(LEFT)), box(LEFT) & box(TOP))


def test_the_report_lists_the_regions(pinned_editor: Editor, base: Generation) -> None:
    boxes = [(0.0, 0.0, 0.25, 0.25), (0.5, 0.5, 1.0, 1.0)]
    edit = pinned_editor.edit(base, "a dog", box=boxes, record=False)
    assert [region.sites for region in edit.report.regions] == [64, 16]
    assert [region.box for region in edit.report.regions] == boxes[::-1]
    lines = str(edit.report).splitlines()
    assert lines[1:3] == [
        "regions   2: 64 sites in rows 8-15, columns 8-15",
        "             16 sites in rows 0-3, columns 0-3",
    ]
    specks = torch.zeros(16, 16, dtype=torch.bool)
    specks[::4, ::4] = True
    report = str(pinned_editor.edit(base, "a dog", mask=specks, record=False).report)
    assert "regions   16: 1 site in rows 0-0, columns 0-0" in report
    assert "             and 13 smaller" in report
