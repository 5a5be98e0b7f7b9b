"""A pipeline makes one run at a time, and says so; pipelines that share their models make theirs at once."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from fisedit_compiler import Editor
from fisedit_compiler.errors import ModeError
from fisedit_compiler.pipelines import Generation
from tests.support.compiled import compiled_pipeline
from tests.support.runs import WAIT, together
from tests.support.tiny_pipeline import PinnedUNet

STEPS = 3
MASK = torch.zeros(16, 16, dtype=torch.bool)
MASK[2:7, 3:9] = True

RUNS: dict[str, Callable[[Editor, Generation], Any]] = {
    "generate": lambda editor, base: editor.generate("a dog", seed=1, num_inference_steps=STEPS),
    "load": lambda editor, base: editor.load(Image.new("RGB", (32, 32)), "a dog", num_inference_steps=STEPS),
    "edit": lambda editor, base: editor.edit(base, "a dog", mask=MASK),
    "edit_many": lambda editor, base: editor.edit_many(base, ["a dog", "a fox"], mask=MASK),
    "dense": lambda editor, base: editor.dense(base, "a dog"),
    "close": lambda editor, base: editor.close(),
}


def test_a_second_run_of_a_pipeline_is_refused(
    tiny_pipe: Any, pinned_editor: Editor, generate: Callable[..., Generation]
) -> None:
    expected = generate(num_inference_steps=STEPS)
    inside, asked = threading.Event(), threading.Event()

    def waiting(*_: object) -> None:
        inside.set()
        asked.wait(WAIT)

    def run() -> Generation:
        return generate(num_inference_steps=STEPS)

    def ask() -> None:
        inside.wait(WAIT)
        try:
            for editor in (pinned_editor, Editor(tiny_pipe)):
                for other in RUNS.values():
                    with pytest.raises(ModeError, match=r"in the middle of another run.*copy\.deepcopy"):
                        other(editor, expected)
        finally:
            asked.set()

    handle = pinned_editor.compiled.register_forward_pre_hook(waiting)
    first, _ = together([run, ask])
    handle.remove()
    assert torch.equal(first.latents[-1], expected.latents[-1])
    assert torch.equal(pinned_editor.dense(expected, "a cat").latents, expected.latents[-1]), "it is free again"


def test_a_run_that_fails_leaves_the_pipeline_free(pinned_editor: Editor, generate: Callable[..., Generation]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = pinned_editor.compiled.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(num_inference_steps=STEPS)
    handle.remove()
    together([lambda: generate(num_inference_steps=STEPS)])


def test_pipelines_that_share_their_models_run_at_once() -> None:
    """As the error advises."""
    shared = compiled_pipeline()

    def own() -> Editor:
        pipe = shared
        parts = {"scheduler": copy.deepcopy(pipe.scheduler), "tokenizer": copy.deepcopy(pipe.tokenizer)}
        apart = type(pipe)(**{**pipe.components, **parts}, requires_safety_checker=False)
        apart.set_progress_bar_config(disable=True)
        return Editor(apart)

    editors = [own() for _ in range(3)]
    assert all(editor.compiled is shared.unet for editor in editors)
    base = editors[0].generate("a cat", seed=3, num_inference_steps=STEPS)

    def made(number: int) -> list[Tensor]:
        editor = editors[number]
        mine = editor.generate("a fox", seed=number, num_inference_steps=STEPS)
        edit = editor.edit(base, "a dog", mask=MASK, record=True)
        again = editor.edit(edit, "a dog and a cat", mask=MASK.roll(number, 0))
        dense = editor.dense(mine, "a dog")
        assert len(dense.call_seconds) == STEPS
        return [*mine.latents, *edit.latents, *again.latents, dense.latents]

    expected = [made(number) for number in range(len(editors))]
    found = together([lambda number=number: made(number) for number in range(len(editors))])
    for now, then in zip(found, expected, strict=True):
        assert all(map(torch.equal, now, then))


def test_an_editor_that_is_closed_while_it_compiles_leaves_nothing_behind(
    tiny_pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing waits; what is asked for after it is refused."""
    given, editor = (tiny_pipe.unet, tiny_pipe.vae), Editor(tiny_pipe)
    compiling, closed = threading.Event(), threading.Event()

    def slowly(module: Any, config: Any, example_inputs: Any = None) -> Any:
        compiling.set()
        closed.wait(0.2)  # where closing does not wait, it is through by then
        return PinnedUNet(module)

    monkeypatch.setattr("fisedit_compiler.api.sparsify", slowly)

    def close() -> None:
        compiling.wait(WAIT)
        editor.close()
        closed.set()

    together([editor.prepare, close])
    assert tiny_pipe.unet is given[0] and tiny_pipe.vae is given[1]
    with pytest.raises(ModeError, match="this Editor is closed"):
        editor.prepare()
    editor.close()
