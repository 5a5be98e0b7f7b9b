"""A second part is one registered function: the unchanged Editor compiles, records and edits it with the UNet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fisedit_compiler import SparseModule, SparsifyConfig, api
from fisedit_compiler.errors import ConfigError, ModeError, RecordingError
from fisedit_compiler.pipelines import Editor, LatentDifference
from fisedit_compiler.pipelines.parts import PARTS, entered, register_part
from tests.support.tiny_pipeline import PinnedUNet, make_tiny_pipeline

DECODER = "vae.decoder"
MASK = torch.zeros(16, 16, dtype=torch.bool)
MASK[3:9, 2:8] = True
OTHER = torch.zeros(16, 16, dtype=torch.bool)
OTHER[8:14, 8:15] = True


@pytest.fixture(scope="module")
def with_decoder() -> Iterator[None]:
    known = dict(PARTS)
    PARTS.pop(DECODER, None)

    @register_part(DECODER)
    def compiled(module: torch.nn.Module, config: SparsifyConfig) -> SparseModule:
        return api.sparsify(module, SparsifyConfig(multiple=1, dense_above=1.0))

    yield
    PARTS.clear()
    PARTS.update(known)


@pytest.fixture(scope="module")
def editor(with_decoder: None) -> Iterator[Editor]:
    with Editor(make_tiny_pipeline(), SparsifyConfig(dense_above=1.0)) as editor:
        yield editor


@pytest.fixture(scope="module")
def base(editor: Editor) -> Any:
    return editor.generate("a cat", seed=3, num_inference_steps=4)


def outside(image: Any, mask: torch.Tensor) -> np.ndarray:
    pixels = mask.numpy().repeat(2, 0).repeat(2, 1)
    return np.asarray(image)[~pixels]


def test_a_base_has_a_recording_of_each_part(editor: Editor, base: Any) -> None:
    assert set(base.recordings) == {"unet", DECODER}
    assert base.recording is base.recordings["unet"] and base.recording.num_calls == 4
    assert base.recordings[DECODER].num_calls == 1 and base.recordings[DECODER].complete
    assert isinstance(editor.pipe.vae.decoder, torch.nn.Module) and editor.pipe.vae.decoder.original is not None


@pytest.mark.parametrize("mask", [MASK, LatentDifference(everywhere_ratio=1.0)], ids=["given", "found"])
def test_an_edit_edits_every_part(mask: Any, editor: Editor, base: Any) -> None:
    edit = editor.edit(base, "a dog", mask=mask)
    assert set(edit.recordings) == {"unet", DECODER}
    assert np.array_equal(outside(edit.image, edit.mask), outside(base.image, edit.mask)), "the decoder was sparse, too"
    assert not np.array_equal(np.asarray(edit.image), np.asarray(base.image))
    assert edit.report.recording_bytes == sum(one.nbytes for one in base.recordings.values())
    assert edit.report.own_bytes == sum(one.own_nbytes for one in edit.recordings.values())
    again = editor.edit(edit, "a fox", mask=OTHER)
    assert np.array_equal(outside(again.image, OTHER), outside(edit.image, OTHER))


def test_every_copy_of_a_batch_has_its_own(editor: Editor, base: Any) -> None:
    masks = [MASK, OTHER]
    for edit, mask in zip(editor.edit_many(base, ["a dog", "a fox"], mask=masks), masks, strict=True):
        assert np.array_equal(outside(edit.image, mask), outside(base.image, mask))
        assert set(edit.recordings) == {"unet", DECODER} and editor.edit(edit, "a bird", mask=MASK).unchanged_outside


@pytest.mark.parametrize("what", ["generate", "edit", "edit of an edit", "edit_many", "load"])
def test_a_run_that_is_stopped_says_so_whatever_its_last_part_missed(what: str, editor: Editor, base: Any) -> None:
    pipe = editor.pipe
    step = type(pipe.scheduler).step
    run = {
        "generate": lambda: editor.generate("a dog", seed=3, num_inference_steps=4),
        "edit": lambda: editor.edit(base, "a dog", mask=MASK),
        "edit of an edit": lambda: editor.edit(edited, "a fox", mask=OTHER),
        "edit_many": lambda: editor.edit_many(base, ["a dog", "a fox"], mask=[MASK, OTHER]),
        "load": lambda: editor.load(base.image, "a cat", num_inference_steps=4),
    }[what]
    edited = editor.edit(base, "a dog", mask=MASK)

    def stopping(*arguments: Any, **options: Any) -> Any:
        pipe._interrupt = True
        return step(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RecordingError, match=r"was stopped after 1 of \d steps"):
        patch.setattr(type(pipe.scheduler), "step", stopping)
        run()
    assert editor.edit(edited, "a fox", mask=OTHER).unchanged_outside


def test_without_recordings_and_beside_the_original(editor: Editor, base: Any) -> None:
    edit = editor.edit(base, "a dog", mask=MASK, record=False)
    assert edit.recordings == {} and edit.recording is None
    compiled = editor.pipe.vae.decoder
    assert editor.dense(base, "a cat").latents.equal(base.latents[-1])
    assert editor.pipe.vae.decoder is compiled


def test_the_pipeline_gets_every_module_back(with_decoder: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "sparsify", lambda module, config=None: PinnedUNet(module))
    pipe = make_tiny_pipeline()
    unet, decoder = pipe.unet, pipe.vae.decoder
    with Editor(pipe) as editor:
        editor.prepare()
        assert pipe.unet is not unet and pipe.vae.decoder is not decoder
        compiled, pipe.vae.decoder = pipe.vae.decoder, decoder
        with pytest.raises(ModeError, match=r"pipe\.vae\.decoder was replaced"):
            editor.prepare()
        pipe.vae.decoder = compiled
    assert pipe.unet is unet and pipe.vae.decoder is decoder


def test_a_part_that_the_pipeline_has_not_or_the_base_did_not_record_is_left_out(with_decoder: None) -> None:
    register_part("image_unet")(lambda module, config: api.sparsify(module, config))
    try:
        with Editor(make_tiny_pipeline(), SparsifyConfig(dense_above=1.0)) as editor:
            base = editor.generate("a cat", seed=3, num_inference_steps=3)
            assert set(base.recordings) == {"unet", DECODER}
            alone = replace(base, recordings={"unet": base.recordings["unet"]})
            edit = editor.edit(alone, "a dog", mask=MASK)
            assert set(edit.recordings) == {"unet"} and edit.unchanged_outside
    finally:
        del PARTS["image_unet"]


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ConfigError, match="there is a part 'unet' already"):
        register_part("unet")


def test_modes_are_left_in_turn_however_they_end() -> None:
    open_modes: list[str] = []

    @contextmanager
    def mode(name: str) -> Iterator[str]:
        open_modes.append(name)
        try:
            yield name.upper()
        finally:
            assert open_modes.pop() == name

    def body(given: Any) -> list[str]:
        assert given == {"a": "A", "b": "B"}
        return list(open_modes)

    modes: Any = {"a": lambda: mode("a"), "b": lambda: mode("b")}
    assert entered(modes, body) == ["a", "b"] and not open_modes

    def interrupted(given: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        entered(modes, interrupted)
    assert not open_modes
