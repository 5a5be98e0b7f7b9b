"""The tiny pipeline and an Editor of it, for every test of pipelines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fisedit_compiler.pipelines import Editor
from fisedit_compiler.pipelines.parts import DECODER, PARTS
from tests.support.tiny_pipeline import STEPS, PinnedUNet, make_tiny_pipeline


@pytest.fixture
def tiny_pipe() -> Any:
    return make_tiny_pipeline()


@pytest.fixture
def pinned_editor(tiny_pipe: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Editor]:
    """An Editor whose compiled UNet is the stand-in, and which leaves the VAE alone."""
    monkeypatch.delitem(PARTS, DECODER)
    monkeypatch.setattr("fisedit_compiler.api.sparsify", lambda unet, config=None: PinnedUNet(unet))
    with Editor(tiny_pipe) as editor:
        yield editor


@pytest.fixture
def generate(pinned_editor: Editor) -> Callable[..., Any]:
    """A short base run."""

    def run(prompt: str = "a cat", **settings: Any) -> Any:
        return pinned_editor.generate(prompt, **{"seed": 3, "num_inference_steps": STEPS, **settings})

    return run
