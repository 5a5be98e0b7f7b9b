"""Reuse across steps through the Editor, with the real compiler."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from fisedit_compiler import masks
from fisedit_compiler.errors import ConfigError
from fisedit_compiler.pipelines import Editor, Generation
from tests.support.compiled import compiled_pipeline

STEPS = 4
LOOSE = 1e9
MASK = masks.regions_mask(16, 16, [(0.25, 0.25, 0.75, 0.75)])
OTHER = masks.regions_mask(16, 16, [(0.5, 0.0, 1.0, 0.5)])


@cache
def base() -> Generation:
    return Editor(compiled_pipeline()).generate("a cat", seed=3, num_inference_steps=STEPS)


def test_edits_reuse_and_can_be_edited_in_turn() -> None:
    editor = Editor(compiled_pipeline())
    edit = editor.edit(base(), "a dog", mask=MASK, reuse=LOOSE)
    assert [kind for kind, _ in edit.report.calls] == ["sparse", "shallow", "shallow", "shallow"]
    assert edit.report.shallow_calls == 3 and edit.report.sparse_calls == 1
    assert "shallow   3 calls" in str(edit.report)
    assert edit.unchanged_outside
    for reuse in (LOOSE, "off"):
        again = editor.edit(edit, "a bird", mask=OTHER, reuse=reuse)
        assert again.unchanged_outside and again.report.shallow_calls == (3 if reuse == LOOSE else 0)
    plain = editor.edit(base(), "a dog", mask=MASK)
    assert plain.report.shallow_calls == 0, "off unless it is asked for"
    assert torch.equal(plain.latents[0], edit.latents[0]) and not torch.equal(plain.latents[-1], edit.latents[-1])


def test_several_edits_are_those_made_alone() -> None:
    editor = Editor(compiled_pipeline())
    together = editor.edit_many(base(), ["a dog", "a bird"], mask=MASK, reuse=LOOSE)
    assert [edit.report.shallow_calls for edit in together] == [3, 3]
    for edit in together:
        alone = editor.edit(base(), edit.prompt, mask=MASK, reuse=LOOSE)
        torch.testing.assert_close(edit.latents[-1], alone.latents[-1], atol=1e-4, rtol=1e-4)
        assert edit.unchanged_outside and edit.recording is not None


def test_what_is_no_tolerance_is_refused_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match="reuse=-1 must be 'off', 'auto', or a tolerance above 0"):
        Editor(compiled_pipeline()).edit(base(), "a dog", mask=MASK, reuse=-1)
