"""The Editor with the real compiler: what the stand-in of the other tests cannot show."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fisedit_compiler import SparsifyConfig
from fisedit_compiler.models import load_pipeline
from fisedit_compiler.pipelines import Editor, LatentDifference

STEPS = 8
SIZE = 128
BASE = "a cat in the center, blue background"
EDIT = "a dog in the center, blue background"


@pytest.fixture(scope="module")
def editor() -> Iterator[Editor]:
    """One compilation of the embedded model for every test here; large masks run sparsely, too."""
    with Editor(load_pipeline(), SparsifyConfig(norm="incremental", dense_above=1.0), progress=False) as editor:
        yield editor


@pytest.fixture(scope="module")
def base(editor: Editor) -> Any:
    return editor.generate(BASE, seed=7, num_inference_steps=STEPS, height=SIZE, width=SIZE)


def center() -> torch.Tensor:
    mask = torch.zeros(SIZE // 4, SIZE // 4, dtype=torch.bool)
    mask[8:24, 8:24] = True
    return mask


def test_recording_leaves_the_picture_alone(editor: Editor, base: Any) -> None:
    dense = editor.dense(base, BASE)
    torch.testing.assert_close(base.latents[-1], dense.latents, rtol=1e-3, atol=1e-3)
    assert base.recording.num_calls == STEPS


def test_drawn_mask_moves_nothing_outside(editor: Editor, base: Any) -> None:
    edit = editor.edit(base, EDIT, mask=center())
    assert edit.unchanged_outside
    assert edit.report.restored_steps == 0
    assert edit.report.sparse_calls == STEPS
    assert edit.report.recording_bytes == sum(one.nbytes for one in base.recordings.values()) > 0
    assert not torch.equal(edit.latents[-1], base.latents[-1])


def test_full_mask_is_the_dense_run(editor: Editor, base: Any) -> None:
    edit = editor.edit(base, EDIT, mask=torch.ones_like(center()), record=False)
    torch.testing.assert_close(edit.latents[-1], editor.dense(base, EDIT).latents, rtol=1e-2, atol=1e-2)


def test_automatic_mask_then_an_edit_of_the_edit(editor: Editor, base: Any) -> None:
    first = editor.edit(base, EDIT, mask=LatentDifference(everywhere_ratio=1.0), dense_calls=3)
    assert first.report.dense_calls == 3
    assert first.report.sparse_calls == STEPS - 3
    assert 0.02 < first.report.area < 0.6
    assert first.unchanged_outside
    second = editor.edit(first, "a dog in the center, red background", mask=~center(), record=False)
    assert second.unchanged_outside
    assert second.report.restored_steps <= first.report.restored_steps
    assert second.recording is None


def test_empty_mask_and_interruption(editor: Editor, base: Any) -> None:
    assert editor.edit(base, EDIT, mask=torch.zeros_like(center())).image is base.image

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = editor.compiled.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        editor.edit(base, EDIT, mask=center())
    handle.remove()
    assert editor.edit(base, EDIT, mask=center(), record=False).unchanged_outside


def test_configured_dilation_grows_what_may_change() -> None:
    with Editor(load_pipeline(), SparsifyConfig(dilation=2), progress=False) as editor:
        base = editor.generate(BASE, seed=7, num_inference_steps=4, height=SIZE, width=SIZE)
        edit = editor.edit(base, EDIT, mask=center(), record=False)
    assert edit.mask.sum() == 20 * 20
    assert edit.unchanged_outside
    assert edit.report.restored_steps == 0
