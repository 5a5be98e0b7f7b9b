"""``edit_many`` takes what ``edit`` takes, for all edits or one each, and each is the edit that is made alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fisedit_compiler import SparsifyConfig, masks
from fisedit_compiler.errors import ConfigError, FiseditError, MaskError, PromptError
from fisedit_compiler.masks import convert
from fisedit_compiler.pipelines import (
    DetectedMask,
    EarlyDifference,
    Edit,
    Editor,
    Generation,
    LatentDifference,
    MaskDetector,
)
from fisedit_compiler.pipelines.editing import refusals, region
from fisedit_compiler.runtime.sessions import edit_masks
from fisedit_compiler.runtime.sessions.edit_session import EditSession
from tests.pipelines.editing.test_batch import unet_batches
from tests.support.tiny_pipeline import make_tiny_pipeline

STEPS = 5
PROMPTS = ("a dog", "a fox", "a cat under fireworks")
BOXES: tuple[Any, ...] = ((0.1, 0.1, 0.5, 0.5), [(0.0, 0.0, 0.3, 0.3), (0.6, 0.6, 1.0, 0.9)], (0.4, 0.2, 0.9, 0.8))
POLYGONS: tuple[Any, ...] = (
    [(0.0, 0.0), (0.9, 0.1), (0.5, 0.9)],
    [[(0.5, 0.5), (0.9, 0.5), (0.9, 0.9)], [(0.0, 0.0), (0.3, 0.0), (0.0, 0.3)]],
    [(0.1, 0.9), (0.8, 0.9), (0.8, 0.2)],
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A second thread costs more in waiting than these small tensors take to compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def editor() -> Iterator[Editor]:
    with Editor(make_tiny_pipeline(), SparsifyConfig(dense_above=1.0, dilation=1)) as editor:
        yield editor


@pytest.fixture(scope="module")
def base(editor: Editor) -> Generation:
    return editor.generate("a cat", seed=3, num_inference_steps=STEPS)


@pytest.fixture(scope="module")
def with_maps(editor: Editor) -> Generation:
    return editor.generate("a cat", seed=3, num_inference_steps=STEPS, maps=3)


def mask(top: int, left: int, bottom: int, right: int) -> Tensor:
    sites = torch.zeros(16, 16, dtype=torch.bool)
    sites[top:bottom, left:right] = True
    return sites


ONE = mask(2, 2, 9, 10)


def assert_alone(edit: Edit, alone: Edit, exactly: bool = True) -> None:
    """The edit of a batch is the one made alone; without ``exactly``, up to what the other masks' sites add."""
    assert torch.equal(edit.mask, alone.mask) and edit.prompt == alone.prompt
    assert edit.negative_prompt == alone.negative_prompt
    mine, report = edit.report, alone.report
    assert (mine.mask_source, mine.feather, mine.area) == (report.mask_source, report.feather, report.area)
    assert [kind for kind, _ in mine.calls] == [kind for kind, _ in report.calls]
    assert mine.restored_steps == report.restored_steps and edit.unchanged_outside
    for latents, expected in zip(edit.latents, alone.latents, strict=True):
        assert torch.equal(latents[..., ~edit.mask], expected[..., ~edit.mask]) or not exactly
        if exactly:
            assert float((latents - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


# -- equal to the edits one by one -----------------------------------------------------------------------------------

FOR_ALL: dict[str, dict[str, Any]] = {
    "box": {"box": BOXES[0]},
    "polygon": {"polygon": POLYGONS[0]},
    "mask and box": {"mask": ONE, "box": BOXES[0]},
    "box and polygon": {"box": BOXES[0], "polygon": POLYGONS[2]},
    "feather": {"mask": ONE, "feather": 2},
    "negative prompt": {"mask": ONE, "negative_prompt": "a bird"},
    "settings of the base": {"mask": ONE, "seed": 3, "num_inference_steps": STEPS, "guidance_scale": 5.0},
}


@pytest.mark.parametrize("name", FOR_ALL)
def test_what_is_given_once_is_every_edits(name: str, editor: Editor, base: Generation) -> None:
    with unet_batches(editor) as batches:
        edits = editor.edit_many(base, PROMPTS, **FOR_ALL[name])
    assert batches == [2 * len(PROMPTS)] * STEPS
    for prompt, edit in zip(PROMPTS, edits, strict=True):
        assert_alone(edit, editor.edit(base, prompt, **FOR_ALL[name]))


EACH: dict[str, dict[str, tuple[Any, ...]]] = {
    "box": {"box": BOXES},
    "polygon": {"polygon": POLYGONS},
    "box or polygon": {"box": (BOXES[0], None, BOXES[1]), "polygon": (None, POLYGONS[1], None)},
    "mask or box": {"mask": (ONE, None, None), "box": (None, *BOXES[1:])},
    "mask in a box": {"mask": (ONE, ONE, mask(4, 4, 16, 16)), "box": BOXES},
}


@pytest.mark.parametrize("name", EACH)
def test_what_is_given_for_each_is_its_own(name: str, editor: Editor, base: Generation) -> None:
    """The sites of the other masks are computed too and take part in what is read near the mask."""
    edits = editor.edit_many(base, PROMPTS, **EACH[name])
    for number, (prompt, edit) in enumerate(zip(PROMPTS, edits, strict=True)):
        own = {argument: values[number] for argument, values in EACH[name].items()}
        assert_alone(edit, editor.edit(base, prompt, **own), exactly=False)


def test_each_edit_has_its_own_border_and_negative_prompt(editor: Editor, base: Generation) -> None:
    feathers, negatives = (0, 1, 3), (None, "a bird", "")
    edits = editor.edit_many(base, PROMPTS, mask=ONE, feather=feathers, negative_prompt=negatives)
    for prompt, feather, negative, edit in zip(PROMPTS, feathers, negatives, edits, strict=True):
        assert_alone(edit, editor.edit(base, prompt, mask=ONE, feather=feather, negative_prompt=negative))
    for given in (np.array(feathers), torch.tensor(feathers)):
        again = editor.edit_many(base, PROMPTS, mask=ONE, feather=[int(one) for one in given])
        assert [edit.report.feather for edit in again] == list(feathers)


class Moved(MaskDetector):
    """A rule of the user's: what moved most after two steps, and what the pipeline and the prompt were."""

    name, max_calls = "moved", 2

    def start(self, context: Any) -> None:
        self.context = context

    def update(self, edited: Tensor, base: Tensor) -> None:
        self.moved = (edited - base).abs().amax(dim=(0, 1)).cpu().float()

    def decide(self, last: bool) -> DetectedMask | None:
        assert self.context.prompt in PROMPTS
        limit = float(self.moved.quantile(0.8))
        return DetectedMask(self.moved > limit, limit, self.moved) if last else None


DETECTORS: dict[str, Any] = {
    "latent-difference": LatentDifference(everywhere_ratio=1.0),
    "early-difference": EarlyDifference(clear=1.0, dilation_radius=0),
    "early-difference, four steps": EarlyDifference(clear=0.0, everywhere_ratio=1.0, dilation_radius=0),
    "one's own": Moved(),
}


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("maps", [False, True], ids=["no maps", "maps"])
def test_each_detector_finds_the_masks_of_the_edits_alone(
    maps: bool, name: str, editor: Editor, base: Generation, with_maps: Generation
) -> None:
    """Dense calls are independent of each other, so the masks are those; what follows computes the others' too."""
    base = with_maps if maps else base
    edits = editor.edit_many(base, PROMPTS, mask=DETECTORS[name], box=(0, 0, 1, 0.8), feather=1)
    for prompt, edit in zip(PROMPTS, edits, strict=True):
        alone = editor.edit(base, prompt, mask=DETECTORS[name], box=(0, 0, 1, 0.8), feather=1)
        assert_alone(edit, alone, exactly=False)
        assert edit.report.detection is not None and alone.report.detection is not None
        assert edit.report.detection.steps == alone.report.detection.steps
        for step in range(edit.report.dense_calls):
            torch.testing.assert_close(edit.latents[step], alone.latents[step], rtol=1e-4, atol=1e-4)


def test_maps_are_reused_for_every_prompt(
    editor: Editor, with_maps: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(EditSession, "reuse_maps", lambda session, columns: seen.append(columns))
    rule = LatentDifference(everywhere_ratio=1.0)
    editor.edit_many(with_maps, PROMPTS, mask=rule)
    for prompt in PROMPTS:
        editor.edit(with_maps, prompt, mask=rule)
    editor.edit_many(with_maps, PROMPTS, mask=ONE)
    together, *alone = seen
    assert len(alone) == len(PROMPTS), "a mask that is given looks for nothing"
    assert torch.equal(together, torch.cat([one[half : half + 1] for half in (0, 1) for one in alone]))
    assert bool((together[: len(PROMPTS)] == -1).all()), "the unconditional samples come first"


def test_steps_to_look_at_are_each_edits_own(editor: Editor, base: Generation) -> None:
    rule = LatentDifference(everywhere_ratio=1.0)
    edits = editor.edit_many(base, PROMPTS, mask=rule, dense_calls=(1, 3, None))
    assert [edit.report.detection.steps for edit in edits if edit.report.detection] == [1, 3, 4]
    for prompt, calls, edit in zip(PROMPTS, (1, 3, None), edits, strict=True):
        assert torch.equal(edit.mask, editor.edit(base, prompt, mask=rule, dense_calls=calls).mask)
        assert edit.report.dense_calls == 4, "calls are dense until the last mask is found"


def test_a_list_of_one_is_the_edit_itself(editor: Editor, base: Generation) -> None:
    for options in ({"box": BOXES[0], "feather": 1}, {"mask": LatentDifference(everywhere_ratio=1.0)}):
        (one,) = editor.edit_many(base, PROMPTS[:1], **options)
        alone = editor.edit(base, PROMPTS[0], **options)
        assert all(torch.equal(mine, its) for mine, its in zip(one.latents, alone.latents, strict=True))
        assert one.report.own_bytes == alone.report.own_bytes
    (one,) = editor.edit_many(base, PROMPTS[:1], box=[BOXES[1]])
    assert torch.equal(one.mask, editor.edit(base, PROMPTS[0], box=BOXES[1]).mask), "several boxes of one edit"


# -- checked once ----------------------------------------------------------------------------------------------------


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    calls: list[Any] = []
    original: Callable[..., Any] = getattr(owner, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counting)
    return calls


@pytest.mark.parametrize("many", [False, True], ids=["one", "several"])
def test_a_mask_is_read_and_grown_once(
    many: bool, editor: Editor, base: Generation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mask.png"
    Image.fromarray(ONE.numpy().astype(np.uint8) * 255).save(path)
    read, grew = counted(monkeypatch, convert, "mask_pixels"), counted(monkeypatch, edit_masks, "grown")
    made = editor.edit_many(base, PROMPTS, mask=path) if many else [editor.edit(base, PROMPTS[0], mask=path)]
    assert all(torch.equal(edit.mask, masks.grown(ONE, 1)) for edit in made[:1])
    assert len(read) == len(grew) == 1


def test_masks_of_their_own_are_read_and_grown_once_each(
    editor: Editor, base: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, grew = counted(monkeypatch, convert, "mask_pixels"), counted(monkeypatch, edit_masks, "grown")
    editor.edit_many(base, PROMPTS, mask=[ONE, mask(8, 6, 14, 15), mask(0, 0, 4, 4)])
    assert len(read) == len(grew) == 3


def test_what_all_edits_share_is_checked_once(
    editor: Editor, base: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = counted(monkeypatch, refusals, "check_prompt")
    schedulers = counted(monkeypatch, refusals, "check_same_scheduler")
    drawn = counted(monkeypatch, region.masks, "box_mask")
    editor.edit_many(base, PROMPTS, box=BOXES[0], negative_prompt="a bird")
    assert [args[1] for args in prompts] == [*PROMPTS, "a bird"]
    assert len(schedulers) == len(drawn) == 1


MISTAKES: dict[str, tuple[dict[str, Any], type[FiseditError], str]] = {
    "a prompt": ({"prompts": ["a dog", 3, "a fox"]}, PromptError, "^edit 2 of 3: the prompt is of type int"),
    "a long prompt": ({"prompts": ["a dog", "a fox", "a cat " * 20]}, PromptError, "^edit 3 of 3: the prompt has"),
    "a negative prompt": (
        {"negative_prompt": ["", 3, None]},
        PromptError,
        "^edit 2 of 3: the negative prompt is of type int",
    ),
    "a mask": ({"mask": [ONE, ONE[:5], ONE]}, MaskError, "^edit 2 of 3: .*16 x 16"),
    "a mask for all": ({"mask": ONE[:5]}, MaskError, "^(?!edit).*16 x 16"),
    "a box": ({"box": [BOXES[0], (0, 0, 2, 2), BOXES[2]]}, MaskError, "^edit 2 of 3: box: "),
    "one of its boxes": ({"box": [BOXES[0], BOXES[2], [BOXES[0], (0, 0, 2, 2)]]}, MaskError, "^edit 3 of 3: box 1: "),
    "a box for all": ({"box": (0, 0, 2, 2)}, MaskError, "^box: "),
    "a polygon": ({"polygon": [[(0, 0), (1, 1)], *POLYGONS[1:]]}, MaskError, "^edit 1 of 3: polygon: "),
    "a mask beside its box": (
        {"mask": mask(0, 0, 3, 3), "box": [BOXES[0], (0.5, 0.5, 1, 1), BOXES[1]]},
        MaskError,
        "^edit 2 of 3: contradictory mask and box",
    ),
    "feather": ({"mask": ONE, "feather": [0, -1, 2]}, ConfigError, "^edit 2 of 3: feather"),
    "feather for all": ({"mask": ONE, "feather": 1.5}, ConfigError, "^feather"),
    "dense calls": ({"dense_calls": [2, 2, STEPS]}, ConfigError, f"^edit 3 of 3: dense_calls={STEPS}"),
    "fewer boxes": ({"box": BOXES[:2]}, MaskError, "^2 boxes were given for 3 prompts; pass one for all.*list of them"),
    "more polygons": ({"polygon": [*POLYGONS, POLYGONS[0]]}, MaskError, "^4 polygons were given for 3 prompts"),
    "fewer borders": ({"mask": ONE, "feather": (1, 2)}, ConfigError, "^2 values of feather were given for 3"),
    "fewer dense calls": ({"dense_calls": [1]}, ConfigError, "^1 values of dense_calls were given for 3 prompts"),
    "fewer negatives": ({"negative_prompt": ["a"]}, PromptError, "^1 negative prompts were given for 3 prompts"),
    "some masks": ({"mask": [ONE, ONE, None]}, MaskError, r"some prompts have a mask.*\(edit 3 of 3 has none\)"),
    "some boxes": ({"box": [None, BOXES[0], None]}, MaskError, r"some prompts have.*\(edit 2 of 3 has one\)"),
    "seed": ({"seed": 4}, ConfigError, "seed=4, but the base was made with 3"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_name_their_edit_before_anything_runs(name: str, editor: Editor, base: Generation) -> None:
    given, error, message = MISTAKES[name]
    options = dict(given)
    prompts = options.pop("prompts", PROMPTS)
    with unet_batches(editor) as batches, pytest.raises(error, match=message) as raised:
        editor.edit_many(base, prompts, **options)
    assert batches == [] and str(raised.value).count("edit ") <= str(raised.value).count(" of 3") + 1
    with pytest.raises(error) as alone:
        editor.edit_many(base, prompts, **options)
    assert str(alone.value) == str(raised.value), "and the second time in the same words"


def test_one_edit_is_not_counted(editor: Editor, base: Generation) -> None:
    for call in (
        lambda: editor.edit(base, "a dog", box=(0, 0, 2, 2)),
        lambda: editor.edit_many(base, ["a dog"], box=[(0, 0, 2, 2)]),
    ):
        with pytest.raises(MaskError, match=r"^box: "):
            call()


def test_a_rule_that_does_not_decide_is_named(editor: Editor, base: Generation) -> None:
    class Undecided(Moved):
        def decide(self, last: bool) -> DetectedMask | None:
            return None if self.context.prompt == PROMPTS[1] else super().decide(last)

    with pytest.raises(MaskError, match=r"^edit 2 of 3: the mask detector 'moved' did not decide"):
        editor.edit_many(base, PROMPTS, mask=Undecided())


def test_no_negative_prompt_beside_one_where_that_is_not_an_empty_one(
    editor: Editor, base: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SDXL's pipelines give zeros for no negative prompt at all, and read an empty one."""
    config = {**editor.pipe.config, "force_zeros_for_empty_prompt": True}
    monkeypatch.setattr(type(editor.pipe), "config", type(editor.pipe.config)(config))
    with pytest.raises(PromptError, match="edit 1 of 3 has no negative prompt and others have one"):
        editor.edit_many(base, PROMPTS, mask=ONE, negative_prompt=[None, "a bird", ""])
