"""Detectors from outside the package: registered by name, or passed as they are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fisedit_compiler.errors import ConfigError, MaskError
from fisedit_compiler.pipelines import DetectedMask, DetectionContext, Editor, MaskDetector
from fisedit_compiler.pipelines.detectors import (
    EarlyDifference,
    LatentDifference,
    make_mask_detector,
    mask_detectors,
    register_mask_detector,
    registry,
)


class Corner(MaskDetector):
    """Marks the upper left corner after its second step, whatever it sees."""

    max_calls = 3

    def __init__(self, decides: bool = True) -> None:
        self.decides, self.seen = decides, 0
        self.context: DetectionContext | None = None

    def start(self, context: DetectionContext) -> None:
        self.context = context

    def update(self, edited: torch.Tensor, base: torch.Tensor) -> None:
        assert edited.shape == base.shape
        self.seen += 1

    def decide(self, last: bool) -> DetectedMask | None:
        if self.seen < 2 or not self.decides:
            return None
        assert self.context is not None and self.context.prompt == "a dog" and self.context.base.prompt == "a cat"
        mask = torch.zeros(16, 16, dtype=torch.bool)
        mask[:4, :4] = True
        return DetectedMask(mask, 0.5, mask.float())


@pytest.fixture
def registered() -> Iterator[str]:
    register_mask_detector("corner")(Corner)
    yield "corner"
    del registry._DETECTORS["corner"]


def test_the_default_comes_first_and_names_make_detectors() -> None:
    assert mask_detectors()[0] == "early-difference"
    assert {"early-difference", "latent-difference"} <= set(mask_detectors())
    assert make_mask_detector() == make_mask_detector("auto") == EarlyDifference()
    assert make_mask_detector("latent-difference") == LatentDifference()


def test_unknown_and_taken_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="no mask detector 'corner'; there are early-difference"):
        make_mask_detector("corner")
    with pytest.raises(ConfigError, match="already"):
        register_mask_detector("auto")
    with pytest.raises(ConfigError, match="already"):
        register_mask_detector("latent-difference")(Corner)
    with pytest.raises(ConfigError, match="looks like a file"):
        register_mask_detector("corner.png")(Corner)


@pytest.mark.parametrize("by", ["name", "instance"])
def test_an_edit_uses_it(by: str, registered: str, pinned_editor: Editor, generate: Callable[..., Any]) -> None:
    base = generate("a cat")
    given = Corner()
    edit = pinned_editor.edit(base, "a dog", mask=registered if by == "name" else given)
    assert given.seen == 0, "an edit works on a fresh copy"
    assert edit.mask.sum() == 16 and edit.mask[:4, :4].all()
    assert edit.report.dense_calls == 2
    assert edit.unchanged_outside
    detection = edit.report.detection
    assert detection is not None and (detection.detector, detection.steps) == ("corner", 2)
    assert detection.area == 16 / 256 and detection.seconds > 0
    assert "corner after 2 steps" in str(edit.report) and "threshold 0.5" in str(edit.report)


def test_one_that_does_not_decide_is_an_error_that_names_it(
    registered: str, pinned_editor: Editor, generate: Callable[..., Any]
) -> None:
    base = generate("a cat")
    with pytest.raises(MaskError, match="'corner' did not decide after its last step"):
        pinned_editor.edit(base, "a dog", mask=Corner(decides=False))
    assert pinned_editor.edit(base, "a dog", mask=registered).unchanged_outside


def test_a_misspelt_name_lists_the_detectors(pinned_editor: Editor, generate: Callable[..., Any]) -> None:
    with pytest.raises(MaskError, match=f"mask detectors are {', '.join(mask_detectors())}"):
        pinned_editor.edit(generate("a cat"), "a dog", mask="latent-differences")


def test_the_one_on_the_page_works(pinned_editor: Editor, generate: Callable[..., Any]) -> None:
    page = (Path(__file__).parents[3] / "docs/masks.md").read_text(encoding="utf-8")
    (block,) = (code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "MaskDetector" in code)
    kept: list[Any] = []

    class Keeping:
        def edit(self, *args: Any, **options: Any) -> None:
            kept.append(pinned_editor.edit(*args, **options))

    try:
        exec(block, {"editor": Keeping(), "base": generate("a cat"), "prompt": "a dog"})
    finally:
        registry._DETECTORS.pop("anything-that-moves", None)
    (edit,) = kept
    assert edit.mask.any() and edit.unchanged_outside
    assert (edit.report.detection.detector, edit.report.detection.steps) == ("anything-that-moves", 2)
