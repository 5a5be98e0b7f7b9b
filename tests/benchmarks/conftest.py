"""The tiny pipeline and an Editor of it, in the place of the embedded model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fisedit_compiler.pipelines import Editor
from tests.support.tiny_pipeline import PinnedUNet, make_tiny_pipeline


@pytest.fixture
def tiny_pipe() -> Any:
    return make_tiny_pipeline()


@pytest.fixture
def pinned_editor(tiny_pipe: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Editor]:
    """An Editor whose compiled UNet is the stand-in."""
    monkeypatch.setattr("fisedit_compiler.api.sparsify", lambda unet, config=None: PinnedUNet(unet))
    with Editor(tiny_pipe) as editor:
        yield editor
