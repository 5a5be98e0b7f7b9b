"""A part is one registered function: the Editor compiles, records and edits all of them together."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import nn

from fisedit_compiler import SparsifyConfig, api, pipelines
from fisedit_compiler.errors import ConfigError, ModeError, RecordingError
from fisedit_compiler.pipelines import Editor, LatentDifference
from fisedit_compiler.pipelines.decoding.decoder import bordered
from fisedit_compiler.pipelines.decoding.vae import SparseVAE
from fisedit_compiler.pipelines.part_registry import usual_parts
from fisedit_compiler.pipelines.parts import DECODER, PARTS, entered, register_part, use
from tests.support.tiny_pipeline import PinnedUNet, make_tiny_pipeline

MASK = torch.zeros(24, 24, dtype=torch.bool)
MASK[3:9, 2:8] = True
OTHER = torch.zeros(24, 24, dtype=torch.bool)
OTHER[14:20, 12:19] = True
SIZE = {"height": 48, "width": 48}


@pytest.fixture(scope="module")
def editor() -> Iterator[Editor]:
    with Editor(make_tiny_pipeline(), SparsifyConfig(dense_above=1.0), parts=None) as editor:
        yield editor


@pytest.fixture(scope="module")
def base(editor: Editor) -> Any:
    return editor.generate("a cat", seed=3, num_inference_steps=4, **SIZE)


def outside(image: Any, mask: torch.Tensor) -> np.ndarray:
    pixels = bordered(mask).numpy().repeat(2, 0).repeat(2, 1)
    assert 0.1 < pixels.mean() < 0.9
    return np.asarray(image)[~pixels]


def test_a_base_has_a_recording_of_each_part(editor: Editor, base: Any) -> None:
    assert set(base.recordings) == {"unet", DECODER}
    assert base.recording is base.recordings["unet"] and base.recording.num_calls == 4
    assert base.recordings[DECODER].complete and base.recordings[DECODER].num_calls <= 1, "its first edit makes it"
    assert isinstance(editor.pipe.vae, AutoencoderKL) and type(editor.pipe.vae) is SparseVAE


@pytest.mark.parametrize("mask", [MASK, LatentDifference(everywhere_ratio=1.0)], ids=["given", "found"])
def test_an_edit_edits_every_part(mask: Any, editor: Editor, base: Any) -> None:
    edit = editor.edit(base, "a dog", mask=mask, box=(0.0, 0.0, 0.4, 0.4))
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
        "generate": lambda: editor.generate("a dog", seed=3, num_inference_steps=4, **SIZE),
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
    compiled = editor.pipe.vae
    assert editor.dense(base, "a cat").latents.equal(base.latents[-1])
    assert editor.pipe.vae is compiled


def test_the_pipeline_gets_every_module_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "sparsify", lambda module, config=None, example_inputs=None: PinnedUNet(module))
    pipe = make_tiny_pipeline()
    unet, vae = pipe.unet, pipe.vae
    with Editor(pipe, parts=None) as editor:
        editor.prepare()
        assert pipe.unet is not unet and pipe.vae is not vae
        compiled, pipe.unet = pipe.unet, unet
        with pytest.raises(ModeError, match=r"pipe\.unet was replaced"):
            editor.prepare()
        pipe.unet = compiled
    assert pipe.unet is unet and pipe.vae is vae


def test_a_part_that_the_pipeline_has_not_or_the_base_did_not_record_is_left_out() -> None:
    register_part("image_unet")(lambda module, config: api.sparsify(module, config))
    try:
        with Editor(make_tiny_pipeline(), SparsifyConfig(dense_above=1.0), parts=None) as editor:
            base = editor.generate("a cat", seed=3, num_inference_steps=3, **SIZE)
            assert set(base.recordings) == {"unet", DECODER}
            alone = replace(base, recordings={"unet": base.recordings["unet"]})
            edit = editor.edit(alone, "a dog", mask=MASK)
            assert set(edit.recordings) == {"unet"} and edit.unchanged_outside and edit.pixels is None
    finally:
        del PARTS["image_unet"]


def test_which_parts_are_compiled_is_asked_for() -> None:
    pipe = make_tiny_pipeline()
    vae = pipe.vae
    with Editor(pipe, SparsifyConfig(dense_above=1.0), parts=("unet",)) as editor:
        assert editor.prepare() is editor and pipe.vae is vae
    remedy = r"pass a tuple of parts that are known: 'unet', 'vae\.decoder'; an Editor takes 'usual'"
    for wrong in (("vae",), "unet"):
        with pytest.raises(ConfigError, match=remedy):
            Editor(pipe, parts=wrong)
    with pytest.raises(ConfigError, match="the UNet is always compiled"):
        Editor(pipe, parts=(DECODER,))


class On(nn.Module):
    """A model on a device that need not be there."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.places = [] if device == "nothing" else [SimpleNamespace(device=torch.device(device))]

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        return iter(self.places)


@pytest.mark.parametrize("backend", ["auto", "inductor", "eager"])
@pytest.mark.parametrize(
    ("unet", "vae"),
    [("cpu", "cpu"), ("cuda", "cuda"), ("mps", "mps"), ("cuda", "cpu"), ("cuda", "nothing"), ("cuda", None)],
)
def test_the_usual_parts_are_the_decoder_too_where_code_is_made_for_it(
    unet: str, vae: str | None, backend: Any
) -> None:
    pipe = SimpleNamespace(unet=On(unet), vae=None if vae is None else On(vae))
    expected = ("unet", DECODER) if unet == vae == "cuda" and backend != "eager" else ("unet",)
    assert usual_parts(pipe, SparsifyConfig(backend=backend)) == expected


def test_the_usual_parts_are_chosen_when_they_are_compiled_and_none_is_missed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A pipeline may be moved to its device after the Editor was made."""
    monkeypatch.setattr(api, "sparsify", lambda module, config=None, example_inputs=None: PinnedUNet(module))
    usual: list[str] = ["unet"]
    monkeypatch.setattr(pipelines.editor, "usual_parts", lambda pipe, config: usual)
    pipe = make_tiny_pipeline()
    own, pipe.vae = pipe.vae, AutoencoderTiny().eval()
    with caplog.at_level(logging.INFO, "fisedit_compiler"), Editor(pipe) as editor:
        usual.append(DECODER)
        editor.prepare()
        levels = [record.levelno for record in caplog.records if "runs as it is" in record.getMessage()]
        assert levels == [logging.INFO], "nobody asked for it"
        pipe.vae = own
        editor.prepare()
        assert type(pipe.vae) is SparseVAE
    assert pipe.vae is own
    with Editor(pipe, parts=("unet",)) as editor:
        assert editor.prepare() is editor and pipe.vae is own


def test_a_vae_of_another_kind_is_left_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(api, "sparsify", lambda module, config=None, example_inputs=None: PinnedUNet(module))
    pipe = make_tiny_pipeline()
    tiny, own = (
        AutoencoderTiny(),
        pipe.vae,
    )
    pipe.vae = tiny.eval()
    with Editor(pipe, parts=None) as editor:
        for _ in range(2):
            editor.prepare()
        said = [record.getMessage() for record in caplog.records if record.name.startswith("fisedit_compiler")]
        assert pipe.vae is tiny and len(said) == 1
        assert said[0].startswith(
            "pipe.vae.decoder is not compiled and runs as it is: AutoencoderTiny is no AutoencoderKL"
        )
        pipe.vae = own
        editor.prepare()
        assert type(pipe.vae) is SparseVAE, "another VAE is taken when it comes"
    assert pipe.vae is own


def test_a_stock_pipeline_uses_its_parts_without_an_editor() -> None:
    pipe = make_tiny_pipeline()
    unet, vae = pipe.unet, pipe.vae

    def run(prompt: str, **options: Any) -> list[Any]:
        generator = [torch.Generator().manual_seed(5) for _ in range(len(prompt) if isinstance(prompt, list) else 1)]
        return list(pipe(prompt, generator=generator, num_inference_steps=3, output_type="np", **SIZE).images)

    (stock,) = run("a cat")
    with use(pipe, SparsifyConfig(dense_above=1.0)) as used:
        with used.record() as recordings:
            (base,) = run("a cat")
        assert np.array_equal(base, stock) and set(recordings) == {"unet", DECODER}
        with used.edit(recordings, MASK, record=True) as sessions:
            (edit,) = run("a dog")
        assert np.array_equal(outside(edit, MASK), outside(base, MASK)) and not np.array_equal(edit, base)
        turns = {name: session.results[0] for name, session in sessions.items()}
        with used.edit(turns, [MASK, OTHER], copies=2):
            pictures = run(["a fox", "a bird"])
        for picture, mask in zip(pictures, (MASK, OTHER), strict=True):
            assert np.array_equal(outside(picture, mask), outside(edit, mask))
        with pytest.raises(RecordingError, match="needs what `with used"), used.edit({}, MASK):
            pass
    assert pipe.unet is unet and pipe.vae is vae
    with pytest.raises(ConfigError, match="has no `unet`"), use(object()):
        pass


def test_the_readmes_lines_for_stock_pipelines_run() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (lines,) = (block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "parts.use(" in block)
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:4, :4] = True
    made = {"load_pipeline": make_tiny_pipeline, "mask": mask, "seeded": lambda: torch.Generator().manual_seed(7)}
    exec(lines, made)
    base, edited = made["base"], made["edited"]
    assert np.array_equal(outside(edited, mask), outside(base, mask)) and not np.array_equal(edited, base)


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
